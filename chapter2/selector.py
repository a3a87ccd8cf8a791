"""The router's decision: a prompt in, an engine out. Needs no network."""

import random
import time
from collections.abc import Collection

from chapter2.index import KvIndex, prefix_names
from chapter2.policy import choose
from chapter2.workers import Worker
from common.protocol import PipelineError
from common.protocol_router import FindWorkerOutput, Policy, State, WorkerState

from dynamo.llm import compute_block_hash_for_seq


class Selector:
    """Chooses among `workers`, by instance id, which whoever follows the engines keeps."""

    def __init__(self, policy: Policy, seed: int | None = None) -> None:
        self.policy = policy
        self.index = KvIndex()
        self.workers: dict[int, Worker] = {}
        self._turn = 0
        self._rng = random.Random(seed)

    def select(
        self, token_ids: list[int], model: str, excluded: Collection[int] = ()
    ) -> FindWorkerOutput:
        """Choose an engine, and count the prompt as sent to it.

        Raises:
            PipelineError: kind `unavailable`, there is no engine to choose.
        """
        workers = self._eligible(model, excluded)
        names: dict[int, list[int]] = {}
        cached: dict[int, int] = {}
        sizes = [worker.source.info.block_size for worker in workers]
        for block_size in set(sizes):
            hashes = compute_block_hash_for_seq(token_ids, block_size)
            names[block_size] = prefix_names(hashes)
            cached |= self.index.overlaps(hashes)
        candidates = [
            worker.candidate(names[block_size], cached.get(worker.instance, 0))
            for worker, block_size in zip(workers, sizes, strict=True)
        ]
        length = max(len(token_ids), 1)
        lengths = [length / block_size for block_size in sizes]
        turns = [worker.turn for worker in workers]
        best, reason = choose(self.policy, candidates, lengths, turns, self._rng)
        worker = self.workers[best.instance_id]
        self._turn += 1
        worker.turn = self._turn
        block_size = worker.source.info.block_size
        worker.expect(names[block_size], best.overlap_blocks)
        return FindWorkerOutput(
            instance_id=best.instance_id,
            worker_id=best.worker_id,
            overlap_blocks=best.overlap_blocks,
            overlap_tokens=best.overlap_blocks * block_size,
            reason=reason,
            candidates=candidates,
        )

    def fail(self, instance: int) -> None:
        """A request to this engine failed: forget what it had, until it is heard of again."""
        if instance in self.workers:
            self.workers[instance].forget()
            self.index.remove(instance)

    def remove(self, instance: int) -> None:
        """The engine has left."""
        self.workers.pop(instance, None)
        self.index.remove(instance)

    def state(self, worker: Worker, block_hashes: list[int]) -> WorkerState:
        """What is known of an engine."""
        state: State = "failed" if worker.failed else "ready" if worker.synced else "starting"
        if state == "ready" and worker.is_silent(time.monotonic()):
            state = "silent"
        return WorkerState(
            instance_id=worker.instance,
            worker_id=worker.source.info.worker_id,
            model=worker.source.info.model,
            state=state,
            blocks=self.index.block_count(worker.instance),
            metrics=worker.metrics,
            block_hashes=block_hashes,
        )

    def _eligible(self, model: str, excluded: Collection[int]) -> list[Worker]:
        """The engines to choose from: those that are silent only if there is no other."""
        known = [
            worker
            for worker in self.workers.values()
            if worker.synced and worker.source.info.model == model
            and worker.instance not in excluded
        ]  # fmt: skip
        now = time.monotonic()
        heard = [worker for worker in known if not worker.is_silent(now)]
        if not known:
            states = ", ".join(
                f"worker {worker.source.info.worker_id} with {worker.source.info.model} is "
                + self.state(worker, []).state
                for worker in self.workers.values()
            )
            raise PipelineError(
                "unavailable",
                f"No engine with the model {model} is ready ({states or 'there is none at all'}).",
            )
        return heard or known
