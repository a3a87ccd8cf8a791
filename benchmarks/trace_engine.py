"""An engine in virtual time: when prompts are computed, tokens come and blocks are evicted.

Continuous batching with chunked prefill. A step decodes one token of every request that is past
its prompt and computes up to `prefill_chunk` tokens of the prompts, first come first served:

    step = decode_base_ms + decode_ms_per_request * (requests that decode)
         + decode_ms_per_1k_kv_tokens * (their tokens / 1000)
         + 1000 * (prompt tokens of the step) / prefill_tokens_per_s        milliseconds

which is `common.engines.simulated`'s step and the time to read the KV cache. Between two events
(a request comes, a prompt is computed, an answer ends) all steps are taken to be equally long,
so that the time of the next event follows by division. A prompt takes one step at least.

A full block is reusable when the prompt it belongs to is computed. A request holds its blocks,
those of its output included, from when it is admitted to its end, so that none has to be
preempted; one that the cache is too small for runs alone.
"""

import heapq
import itertools
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from typing import Protocol

from benchmarks.trace import BLOCK_SIZE, TraceRequest
from benchmarks.trace_cache import BlockCache
from common.protocol import EngineMetrics


@dataclass(frozen=True)
class EngineSettings:
    """`cache_blocks` of 512 tokens; rates are about those of a 70B model on four H100s."""

    cache_blocks: int = 2000
    prefill_tokens_per_s: float = 4000.0
    prefill_chunk: int = 2048
    decode_base_ms: float = 15.0
    decode_ms_per_request: float = 0.2
    decode_ms_per_1k_kv_tokens: float = 0.02
    max_running: int = 256

    def at_speed(self, speed: float) -> "EngineSettings":
        """Those of an engine that computes `speed` times as fast."""
        return replace(
            self,
            prefill_tokens_per_s=self.prefill_tokens_per_s * speed,
            decode_base_ms=self.decode_base_ms / speed,
            decode_ms_per_request=self.decode_ms_per_request / speed,
            decode_ms_per_1k_kv_tokens=self.decode_ms_per_1k_kv_tokens / speed,
        )


@dataclass(eq=False, slots=True)
class Running:
    """A request in an engine; times in seconds, `left` in prompt tokens to compute."""

    id: str
    request: TraceRequest
    arrived: float
    cached_tokens: int = 0
    held: list[int] = field(default_factory=list)  # its blocks that are cached, from the start
    own_blocks: int = 0  # its other blocks
    expected_tokens: float = 0.0  # to compute, as it looked when it arrived
    left: float = 0.0
    started: float | None = None
    first_token: float | None = None
    finished: float | None = None


class Listener(Protocol):
    """Who hears what an engine does, at its virtual time."""

    def first_token(self, running: Running, now: float) -> None: ...

    def finished(self, running: Running, now: float) -> None: ...

    def stored(self, instance: int, request: TraceRequest, first: int) -> None:
        """The request's full blocks from number `first` on are newly cached."""

    def removed(self, instance: int, blocks: list[int]) -> None: ...


class TraceEngine:
    """One engine; `advance` brings it to a later time."""

    def __init__(self, instance: int, settings: EngineSettings, listener: Listener) -> None:
        self.instance = instance
        self.settings = settings
        self.now = 0.0
        self.busy_s = 0.0
        self.prefilled_tokens = 0.0
        self.cache = BlockCache(settings.cache_blocks)
        self._listener = listener
        self._waiting: deque[Running] = deque()
        self._prefills: deque[Running] = deque()
        self._decodes: list[tuple[float, int, Running]] = []  # a heap, by their last step
        self._numbers = itertools.count()
        self._steps = 0.0  # that were taken since the start
        self._kv_tokens = 0
        self._expected_blocks: Counter[int] = Counter()  # of prompts that are not computed yet
        self._expected_tokens = 0.0  # of those that have not started

    @property
    def metrics(self) -> EngineMetrics:
        running = len(self._prefills) + len(self._decodes)
        return EngineMetrics(running, len(self._waiting), self.cache.used, self.cache.blocks)

    def submit(self, running: Running) -> None:
        """A request arrives now."""
        running.expected_tokens = self._new_tokens(running.request)
        self._expected_tokens += running.expected_tokens
        self._expected_blocks.update(running.request.full_blocks)
        self._waiting.append(running)
        self._admit()

    def seconds_to_finish(self, request: TraceRequest) -> float:
        """How long a request that came now would take to its end, if no other one came.

        Takes the steps to be as long as they are now, and the cache to have room.
        """
        left = self._expected_tokens + (self._prefills[0].left if self._prefills else 0.0)
        step = self._decode_seconds()
        with_prefill = step + self.settings.prefill_chunk / self.settings.prefill_tokens_per_s
        prefill = (left + self._new_tokens(request)) * with_prefill / self.settings.prefill_chunk
        return prefill + step * request.output_length

    def next_event(self) -> float:
        """When something will happen if nothing comes; infinity if the engine is idle."""
        seconds = float("inf")
        if self._prefills:
            seconds = self._prefills[0].left * self._prefill_seconds_per_token()
        if self._decodes:
            decode = (self._decodes[0][0] - self._steps) * self._step_seconds()
            seconds = min(seconds, decode)
        return self.now + max(seconds, 0.0)

    def advance(self, to: float) -> None:
        """Let time pass up to `to`, at most the next event; then let that happen."""
        seconds = to - self.now
        if seconds > 0 and (self._prefills or self._decodes):
            self.busy_s += seconds
            self._steps += seconds / self._step_seconds()
            if self._prefills:
                self._prefills[0].left -= seconds / self._prefill_seconds_per_token()
        self.now = to

    def happen(self) -> None:
        """Do what is due now."""
        tiny = 1e-6
        if computed := bool(self._prefills) and self._prefills[0].left <= tiny:
            self._end_prefill(self._prefills.popleft())
        while self._decodes and self._decodes[0][0] <= self._steps + tiny:
            self._finish(heapq.heappop(self._decodes)[2])
        if computed and self._prefills:
            self._start_prefill(self._prefills[0])
        self._admit()

    def _new_tokens(self, request: TraceRequest) -> float:
        blocks = request.full_blocks
        known = self.cache.match(blocks)
        while known < len(blocks) and blocks[known] in self._expected_blocks:
            known += 1
        return max(request.input_length - known * BLOCK_SIZE, 1)

    def _decode_seconds(self) -> float:
        settings = self.settings
        milliseconds = (
            settings.decode_base_ms
            + settings.decode_ms_per_request * len(self._decodes)
            + settings.decode_ms_per_1k_kv_tokens * self._kv_tokens / 1e3
        )
        return milliseconds / 1e3

    def _step_seconds(self) -> float:
        prefill = self.settings.prefill_chunk / self.settings.prefill_tokens_per_s
        return self._decode_seconds() + (prefill if self._prefills else 0.0)

    def _prefill_seconds_per_token(self) -> float:
        return self._step_seconds() / self.settings.prefill_chunk

    def _admit(self) -> None:
        settings, cache = self.settings, self.cache
        while self._waiting and len(self._prefills) + len(self._decodes) < settings.max_running:
            running = self._waiting[0]
            request = running.request
            blocks = request.full_blocks
            matched = blocks[: cache.match(blocks)]
            total = -(-(request.input_length + request.output_length) // BLOCK_SIZE)
            others = self._prefills or self._decodes
            if others and not cache.has_room(matched, total - len(matched)):
                break
            self._waiting.popleft()
            cache.hold(matched)
            running.held = matched
            running.own_blocks = total - len(matched)
            cache.own += running.own_blocks
            self._evict()
            self._prefills.append(running)
            if len(self._prefills) == 1:
                self._start_prefill(running)

    def _start_prefill(self, running: Running) -> None:
        """What the prompts before it have computed since it was admitted is reused, too."""
        request, cache = running.request, self.cache
        blocks = request.full_blocks
        self._expected_tokens -= running.expected_tokens
        more = blocks[len(running.held) : cache.match(blocks)]
        cache.hold(more)
        running.held = running.held + more
        running.own_blocks -= len(more)
        cache.own -= len(more)
        # The last token is computed in any case: the first one of the answer follows from it.
        running.cached_tokens = min(len(running.held) * BLOCK_SIZE, request.input_length - 1)
        running.started = self.now
        new = request.input_length - running.cached_tokens
        self.prefilled_tokens += new
        running.left = new + self._decode_seconds() / self._prefill_seconds_per_token()  # one step

    def _end_prefill(self, running: Running) -> None:
        request, cache = running.request, self.cache
        blocks = request.full_blocks
        first = cache.match(blocks)
        new = blocks[len(running.held) :]
        cache.hold(new)
        running.held = blocks
        running.own_blocks -= len(new)
        cache.own -= len(new)
        if first < len(blocks):
            self._listener.stored(self.instance, request, first)
        self._expected_blocks.subtract(blocks)
        self._expected_blocks += Counter()  # keeps those above zero
        running.first_token = self.now
        self._kv_tokens += request.input_length
        last = self._steps + request.output_length - 1
        heapq.heappush(self._decodes, (last, next(self._numbers), running))
        self._listener.first_token(running, self.now)

    def _finish(self, running: Running) -> None:
        running.finished = self.now
        self._kv_tokens -= running.request.input_length
        self.cache.own -= running.own_blocks
        self.cache.release(running.held)
        self._evict()
        self._listener.finished(running, self.now)

    def _evict(self) -> None:
        evicted = self.cache.evict()
        if evicted:
            self._listener.removed(self.instance, evicted)
