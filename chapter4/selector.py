"""The router's decision: a prompt in, an engine out. Needs no network and no clock of its own."""

import random
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial

from chapter4.active import ActiveRequests
from chapter4.decision import Decision, PolicyInUse, decide
from chapter4.disaggregation import PrefillRule, decode_id, is_prefill_id, prefill_id
from chapter4.eligible import decode_engines, prefill_engines
from chapter4.health import FleetHealth
from chapter4.index import KvIndex
from chapter4.prompt_blocks import known_blocks
from chapter4.routed import routed_as
from chapter4.snapshot import RequestView, Snapshot, WorkerView, request_view
from chapter4.workers import Worker
from common.protocol_replicas import Routed
from common.protocol_routing import RequestReport, RouteRequest

from dynamo.llm import compute_block_hash_for_seq

MEAN_OUTPUT_SHARE = 0.05  # of a new answer in the mean length
SEED_BITS = 32


@dataclass
class Selector:
    """Chooses among `workers`, by instance id, which whoever follows the engines keeps."""

    policy: PolicyInUse
    shadow: PolicyInUse | None = None
    index: KvIndex = field(default_factory=KvIndex)
    workers: dict[int, Worker] = field(default_factory=dict)
    active: ActiveRequests = field(default_factory=ActiveRequests)
    health: FleetHealth = field(default_factory=FleetHealth)
    rng: random.Random = field(default_factory=random.Random)
    prefill_rule: PrefillRule = field(default_factory=PrefillRule)
    mean_output_tokens: float = 128.0
    changed: Callable[[], None] = lambda: None  # called when an engine may have room again
    tell: Callable[[Routed], None] = lambda routed: None  # called with every decision
    heard: Callable[[RequestReport], None] = lambda report: None  # called with every report
    _turn: int = 0
    # The last requests of whose end it was heard before their beginning.
    _ended_first: deque[str] = field(default_factory=partial(deque, maxlen=256))

    def select(self, wanted: RouteRequest, now: float, excluded: Collection[int] = ()) -> Decision:
        """Choose an engine, and count the prompt as sent to it.

        Raises:
            PipelineError: kind `unavailable`, there is no engine to choose.
        """
        return self.select_for(
            request_view(wanted, self.mean_output_tokens),
            partial(compute_block_hash_for_seq, wanted.token_ids),
            now,
            model=wanted.model,
            request_id=wanted.request_id,
            excluded=excluded,
        )

    def select_for(
        self,
        request: RequestView,
        block_hashes: Callable[[int], list[int]],
        now: float,
        *,
        model: str,
        request_id: str,
        excluded: Collection[int] = (),
    ) -> Decision:
        """`select` for a prompt of which only the hashes are known, by block size."""
        workers = self.eligible(model, excluded, now)
        decision, names = self._decide(workers, request, block_hashes, now)
        self._decide_prefill(decision, request_id, block_hashes, model, excluded)
        self._route(request_id, decision, names)
        return decision

    def _decide_prefill(
        self,
        decision: Decision,
        request_id: str,
        block_hashes: Callable[[int], list[int]],
        model: str,
        excluded: Collection[int],
    ) -> None:
        """Have another engine compute the prompt, if there is one and it pays."""
        request, now = decision.snapshot.request, decision.snapshot.now
        decode = self.workers[decision.worker.instance_id].source
        every = self.workers.values() if decode.role == "decode" else ()
        engines = prefill_engines(every, self.health, model, excluded, now, decode.info.backend)
        if not engines:
            return
        prefill, names = self._decide(engines, request, block_hashes, now)
        if self.prefill_rule.applies(decode, decision.worker, prefill.worker):
            decision.prefill, decision.prefill_id = prefill, prefill_id(request_id)
            decision.reason += f"; the prompt is computed by worker {prefill.worker.worker_id}"
            self._route(decision.prefill_id, prefill, names)

    def _decide(
        self,
        workers: Sequence[Worker],
        request: RequestView,
        block_hashes: Callable[[int], list[int]],
        now: float,
    ) -> tuple[Decision, list[int]]:
        """The policy's choice among some engines, and the names of the prompt's blocks there."""
        hashes, names, cached = known_blocks(self.index, workers, block_hashes)
        views = self._worker_views(workers, names, cached, request.prompt_tokens, now)
        snapshot = Snapshot(request, views, now, self.rng.getrandbits(SEED_BITS))
        decision = decide(snapshot, self.policy, self.shadow)
        decision.tokens_hashes = hashes[decision.worker.block_size]
        return decision, names[decision.worker.block_size]

    def views(
        self, wanted: RouteRequest, now: float, excluded: Collection[int] = ()
    ) -> tuple[WorkerView, ...]:
        """What a policy would see of those that may compute the prompt; raises as `select`."""
        workers = self.eligible(wanted.model, excluded, now)
        prefill = prefill_engines(self.workers.values(), self.health, wanted.model, excluded, now)
        hashes = partial(compute_block_hash_for_seq, wanted.token_ids)
        _, names, cached = known_blocks(self.index, [*workers, *prefill], hashes)
        tokens = len(wanted.token_ids)
        views = self._worker_views(workers, names, cached, tokens, now)
        known = [(worker.source, view) for worker, view in zip(workers, views, strict=True)]
        return self.prefill_rule.computing(
            known, self._worker_views(prefill, names, cached, tokens, now)
        )

    def report(self, known: RequestReport, now: float) -> None:
        """What became of a routed request."""
        self.heard(known)
        request_id, instance = known.request_id, known.instance_id
        seconds, tokens = known.ms / 1e3, known.output_tokens
        if known.kind == "first_token":
            self.active.first_token(request_id, now)
            self.health.first_token(instance, request_id, seconds, now)
            return
        if is_prefill_id(request_id):
            computed = known.kind == "finished" and tokens > 0
            self._begin(decode_id(request_id), now, computed=computed)
        if (request := self.active.requests.get(request_id)) is None:
            self._ended_first.append(request_id)
        elif request.instance != instance:  # two routers chose, one of them too late
            self.health.ended(request.instance, request_id)
        self.active.finish(request_id, now)
        if known.kind == "finished":
            if not is_prefill_id(request_id):
                self.finished(tokens)
            self.health.finished(instance, request_id, seconds, tokens, now)
        elif tokens:
            self.health.failed(instance, request_id, now)
        # Without a token, a refusal may be the request's fault; see `FindWorkerRequest.failed`.
        self.health.ended(instance, request_id)

    def _begin(self, request_id: str, now: float, *, computed: bool) -> None:
        """The engine gets it only now that another one is done with its prompt."""
        request = self.active.begin(request_id, now, computed=computed)
        if request is not None:
            self.health.sent(
                request.instance,
                request_id,
                now,
                tokens=self.active.load(request.instance).prefill_tokens,
                own_tokens=request.prefill_tokens,
                waits=request.waits,
            )

    def finished(self, output_tokens: int) -> None:
        """An answer had so many tokens: the next ones may, too; a refusal has none."""
        if output_tokens:
            self.mean_output_tokens += MEAN_OUTPUT_SHARE * (output_tokens - self.mean_output_tokens)

    def fail(self, instance: int) -> None:
        """A request to this engine failed: forget what it had, until it is heard of again."""
        if instance in self.workers:
            self.workers[instance].forget()
            self.index.remove(instance)
            self.active.remove_instance(instance)
            self.changed()

    def remove(self, instance: int) -> None:
        """The engine has left."""
        self.workers.pop(instance, None)
        self.health.remove(instance)
        self.index.remove(instance)
        self.active.remove_instance(instance)
        self.changed()

    def _worker_views(
        self,
        workers: Sequence[Worker],
        names: dict[int, list[int]],
        cached: dict[int, int],
        prompt_tokens: int,
        now: float,
    ) -> tuple[WorkerView, ...]:
        return tuple(
            worker.view(
                names[worker.source.info.block_size],
                cached.get(worker.instance, 0),
                prompt_tokens=max(prompt_tokens, 1),
                cached_blocks=self.index.block_count(worker.instance),
                load=self.active.load(worker.instance),
                health=self.health.state(worker.instance),
                now=now,
            )
            for worker in workers
        )

    def _route(self, request_id: str, decision: Decision, names: list[int]) -> None:
        """Count the prompt as sent to the engine that was chosen."""
        waits = self.workers[decision.worker.instance_id].is_full(decision.worker)
        routed = routed_as(request_id, decision, names, waits=waits)
        self.count(routed, decision.snapshot.now)
        self.tell(routed)

    def count(self, routed: Routed, now: float) -> None:
        """Count a request as sent to an engine, by this router or another one."""
        if routed.request_id in self._ended_first:
            return
        if worker := self.workers.get(routed.instance):
            self._turn += 1
            worker.turn = self._turn
            worker.expect(routed.names, routed.overlap, now)
        if routed.request_id:
            if not routed.elsewhere:
                self.health.sent(
                    routed.instance,
                    routed.request_id,
                    now,
                    tokens=routed.tokens,
                    own_tokens=routed.own_tokens,
                    waits=routed.waits,
                )
            self.active.add(routed, now)

    def eligible(self, model: str, excluded: Collection[int], now: float) -> list[Worker]:
        """See `eligible.decode_engines`."""
        return decode_engines(self.workers.values(), self.health, model, excluded, now)
