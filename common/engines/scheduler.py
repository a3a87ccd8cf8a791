"""Continuous batching: which tokens of which requests the next step computes.

Every step first serves the requests that decode (one token each), then fills up to
`prefill_chunk` tokens with the prompts of the others, first come first served, so that a long
prompt delays a running decode by one chunk at most. KV that another engine computed is taken over
instead of computed, `import_blocks` in a step. When the cells run out, the request that came last
gives up its place, keeps what blocks it can, and waits to be computed again.
"""

import time
from collections import deque
from dataclasses import dataclass

from common.engines.block_cache import BlockCache
from common.engines.blocks import CachedSequence
from common.engines.scheduled_request import ScheduledRequest
from common.kv import block_hashes
from common.protocol import EngineMetrics, FinishReason, PipelineError


@dataclass(slots=True)
class Work:
    """Tokens of one request to compute in a step; `sample` when the last one's logits count.

    They follow the sequence's first `start` ones. With `received` they are not computed: that
    block of `request.received` is taken over.
    """

    request: ScheduledRequest
    sequence: CachedSequence
    start: int
    tokens: list[int]
    sample: bool = False
    received: int | None = None


class Scheduler:
    """Admission, batching and preemption over one block cache; not thread-safe."""

    def __init__(
        self,
        cache: BlockCache,
        *,
        max_running: int,
        max_waiting: int,
        prefill_chunk: int,
        import_blocks: int = 32,
    ) -> None:
        self.cache = cache
        self.waiting: deque[ScheduledRequest] = deque()
        self.running: dict[ScheduledRequest, CachedSequence] = {}  # in the order of arrival
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._prefill_chunk = prefill_chunk
        self._import_blocks = import_blocks
        self._prompt_tokens = self._cached_tokens = self._output_tokens = 0
        self._received_tokens = 0

    @property
    def is_idle(self) -> bool:
        return not self.running and not self.waiting

    def add(self, request: ScheduledRequest) -> None:
        """Start the request or let it wait for its turn.

        Raises:
            PipelineError: kind `overloaded`, the queue is full.
        """
        request.block_hashes = block_hashes(request.tokens, self.cache.block_size)
        self.waiting.append(request)
        self._admit()
        if request not in self.running and len(self.waiting) > self._max_waiting:
            self.waiting.pop()
            raise PipelineError(
                "overloaded",
                f"the engine is full: {len(self.running)} requests running and "
                f"{len(self.waiting)} waiting, the most it queues is {self._max_waiting}",
            )

    def drop_stopped(self) -> list[ScheduledRequest]:
        """Take out the requests whose callers want no more, and free what they hold."""
        stopped = [r for r in (*self.running, *self.waiting) if r.is_stopped()]
        for request in stopped:
            self.finish(request)
        return stopped

    def finish(self, request: ScheduledRequest) -> None:
        """Take the request out; its full blocks stay cached, and are retained if it says so."""
        sequence = self.running.pop(request, None)
        if sequence is None:
            self.waiting.remove(request)
            return
        self.cache.finish(sequence)
        if request.retain_s > 0 and sequence.id in self.cache.finished:
            prompt_blocks = request.prompt_length // self.cache.block_size
            self.cache.retention.add(sequence, request.retain_s, prompt_blocks)

    def plan(self) -> list[Work]:
        """The work of the next step, with cells reserved for it; empty if there is none."""
        self._admit()
        while True:
            work = self._batch()
            if self.cache.reserve(sum(len(item.tokens) for item in work)):
                return work
            self._preempt(next(reversed(self.running)))

    def computed(self, work: list[Work]) -> None:
        """The work is done: its tokens' KV is in memory."""
        for item in work:
            self.cache.append(item.sequence, item.tokens)
            if item.received is not None:
                self._received_tokens += len(item.tokens)

    def add_output(self, request: ScheduledRequest, token: int) -> FinishReason | None:
        """Append a generated token, unless it ends the request, and tell whether it is over."""
        if request.first_token is None:
            request.first_token = time.perf_counter()
        if token in request.stop_ids and request.output_length >= request.sampling.min_tokens:
            return "stop"
        request.tokens.append(token)
        self._output_tokens += 1
        return "length" if request.output_length >= request.max_tokens else None

    def metrics(self) -> EngineMetrics:
        """The load now; see `EngineMetrics`."""
        missing = sum(
            len(request.tokens) - len(sequence.tokens) for request, sequence in self.running.items()
        )
        return EngineMetrics(
            running=len(self.running),
            waiting=len(self.waiting),
            used_blocks=self.cache.active_blocks + missing // self.cache.block_size,
            total_blocks=self.cache.cells // self.cache.block_size,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            output_tokens=self._output_tokens,
            received_tokens=self._received_tokens,
            retained_blocks=self.cache.retention.blocks_now(),
        )

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self._max_running:
            request = self.waiting[0]
            matched = self.cache.match(request.tokens, request.block_hashes)
            reused = len(matched) * self.cache.block_size
            # The others' prompts that are still to compute, and a block each to go on decoding.
            promised = sum(
                len(other.tokens) - len(sequence.tokens) + self.cache.block_size
                for other, sequence in self.running.items()
            )
            if not self.cache.has_room(matched, len(request.tokens) - reused + promised):
                return
            self.waiting.popleft()
            self.running[request] = self.cache.start(matched)
            if request.started is None:
                request.started = time.perf_counter()
                request.cached_tokens = reused
                self._prompt_tokens += len(request.tokens)
                self._cached_tokens += reused

    def _batch(self) -> list[Work]:
        decodes: list[Work] = []
        prefills: list[Work] = []
        imports: list[Work] = []
        budget = self._prefill_chunk
        for request, sequence in self.running.items():
            if budget and request.first_token is None:
                self._reuse(request, sequence)
            start = len(sequence.tokens)
            missing = len(request.tokens) - start
            if missing == 1:
                request.received = None
            elif request.next_block_received(start, self.cache.block_size) is not None:
                taken = self._imports(request, sequence, self._import_blocks - len(imports))
                imports += taken
                end = start + sum(len(item.tokens) for item in taken)
                if len(request.tokens) - end == 1:
                    last = request.tokens[end:]
                    decodes.append(Work(request, sequence, end, last, sample=True))
                continue
            count = 1 if missing == 1 else min(missing, budget, self._gap(request, start))
            if count:
                tokens = request.tokens[start : start + count]
                work = Work(request, sequence, start, tokens, sample=count == missing)
                (decodes if missing == 1 else prefills).append(work)
                budget -= 0 if missing == 1 else count
        return imports + decodes + prefills

    def _imports(
        self, request: ScheduledRequest, sequence: CachedSequence, limit: int
    ) -> list[Work]:
        """The next blocks that the request takes over, at most `limit`."""
        size = self.cache.block_size
        start = len(sequence.tokens)
        work: list[Work] = []
        while len(work) < limit:
            block = request.next_block_received(start, size)
            if block is None or request.received is None:
                break
            end = min(start + size, request.received.tokens)
            tokens = request.tokens[start:end]
            work.append(Work(request, sequence, start, tokens, received=block))
            start = end
        return work

    def _gap(self, request: ScheduledRequest, start: int) -> int:
        """How many tokens to compute before blocks that were received can follow, if any do."""
        received = request.received
        first = 0 if received is None else received.first * self.cache.block_size
        return first - start if first > start else len(request.tokens)

    def _reuse(self, request: ScheduledRequest, sequence: CachedSequence) -> None:
        """Requests that came together often begin alike: only one computes what they share."""
        reused = self.cache.catch_up(sequence, request.tokens, request.block_hashes)
        request.cached_tokens += reused
        self._cached_tokens += reused

    def _preempt(self, request: ScheduledRequest) -> None:
        self.cache.finish(self.running.pop(request))
        request.block_hashes = block_hashes(request.tokens, self.cache.block_size)
        self.waiting.appendleft(request)
