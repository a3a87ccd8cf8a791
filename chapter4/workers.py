"""What the router knows of each engine's load: what the engine says, and what it was just sent.

Times are in seconds of any clock that only goes forward, the same for all.
"""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from chapter4.engine_load import EngineLoad
from chapter4.snapshot import WorkerView
from common.protocol import EngineMetrics
from common.protocol_router import KvSource, State
from common.protocol_routing import HealthState

# What was routed counts as load until the engine's own figures include it.
PREDICTED_LOAD_S = 0.1
# A prompt counts as cached where it was sent, so that the next one like it follows; the events
# come when it is computed.
PREDICTED_CACHE_S = 10.0
SILENT_AFTER_S = 3.0


@dataclass(frozen=True, slots=True)
class Routed:
    """A request that was sent to an engine at `time`, and the blocks it will newly use.

    `names` has those of them that are full, which another prompt may share.
    """

    time: float
    new_blocks: int
    names: tuple[int, ...]  # unlike a list, nothing that the garbage collector keeps scanning


@dataclass(eq=False, slots=True)
class Worker:
    """One engine. `synced`: the index has what it has cached, so it may be chosen."""

    instance: int
    source: KvSource
    synced: bool = False
    failed: bool = False
    heard: float = 0.0
    failures: int = 0
    turn: int = 0
    tags: frozenset[str] = frozenset()
    metrics: EngineMetrics | None = None
    _routed: deque[Routed] = field(default_factory=deque)  # counts as load
    _routed_blocks: int = 0
    _expected: deque[Routed] = field(default_factory=deque)  # counts as cached
    _prefixes: dict[int, float] = field(default_factory=dict)  # the names in it: until when

    @property
    def routed_requests(self) -> int:
        """How many were sent here of which its own figures may not tell yet."""
        return len(self._routed)

    def is_silent(self, now: float) -> bool:
        return now - self.heard > SILENT_AFTER_S

    def state(self, now: float) -> State:
        if self.failed or not self.synced:
            return "failed" if self.failed else "starting"
        return "silent" if self.is_silent(now) else "ready"

    def hear(self, metrics: EngineMetrics, now: float) -> None:
        """Take the engine's own figures; they include what was routed a while ago."""
        self.heard = now
        self.metrics = metrics
        self._forget_load_before(self.heard - PREDICTED_LOAD_S)

    def expect(self, names: list[int], overlap: int, now: float) -> None:
        """A prompt, given by its blocks' names, was routed here; `overlap` of them are cached."""
        routed = Routed(now, len(names) + 1 - overlap, tuple(names[overlap:]))
        self._routed.append(routed)
        self._routed_blocks += routed.new_blocks
        self._expected.append(routed)
        self._prefixes.update(dict.fromkeys(routed.names, now + PREDICTED_CACHE_S))
        while self._expected and self._expected[0].time + PREDICTED_CACHE_S <= now:
            for name in self._expected.popleft().names:
                if self._prefixes.get(name, math.inf) <= now:  # else it was sent here again
                    del self._prefixes[name]
        # An engine that has sent no figures for long may never do so.
        self._forget_load_before(now - PREDICTED_CACHE_S)

    def forget(self) -> None:
        """The engine failed: nothing that was expected of it will come."""
        self.synced, self.failed = False, True
        self.failures += 1
        self.metrics = None
        self._routed.clear()
        self._routed_blocks = 0
        self.expect_nothing()

    def settle(self, names: Iterable[int]) -> None:
        """The engine's events have told what became of these blocks."""
        for name in names:
            self._prefixes.pop(name, None)

    def expect_nothing(self) -> None:
        """What was routed here is not cached, or not any more."""
        self._expected.clear()
        self._prefixes.clear()

    def overlap(self, names: list[int], cached: int, now: float) -> int:
        """How many of the prompt's blocks it has or will soon have; `cached` it has for sure."""
        while cached < len(names) and self._prefixes.get(names[cached], 0.0) > now:
            cached += 1
        return cached

    def view(
        self,
        names: list[int],
        cached: int,
        *,
        prompt_tokens: int,
        cached_blocks: int,
        load: EngineLoad,
        health: HealthState = "healthy",
        now: float,
    ) -> WorkerView:
        """What a policy sees of this engine, for a prompt given by its blocks' names."""
        info = self.source.info
        metrics = self.metrics or EngineMetrics(0, 0, 0, info.total_blocks)
        # A new request joins the queue, if there is one.
        queued = len(self._routed) if metrics.waiting else 0
        total_blocks = max(metrics.total_blocks, 1)
        return WorkerView(
            instance_id=self.instance,
            worker_id=info.worker_id,
            block_size=info.block_size,
            prompt_blocks=prompt_tokens / info.block_size,
            overlap_blocks=self.overlap(names, cached, now),
            running=metrics.running + len(self._routed) - queued,
            waiting=metrics.waiting + queued,
            used_blocks=min(metrics.used_blocks + self._routed_blocks, total_blocks),
            total_blocks=total_blocks,
            cached_blocks=cached_blocks,
            prefill_tokens=load.prefill_tokens,
            prefill_requests=load.prefill_requests,
            decode_requests=load.decode_requests,
            active_blocks=load.active_blocks,
            active_prompt_blocks=load.prompt_blocks,
            new_prompt_blocks=load.new_prompt_blocks(names),
            prefill_s=load.prefill_s(now),
            prefill_tokens_per_s=load.prefill_tokens_per_s,
            answer_s=load.answer_s,
            max_running=info.max_running,
            turn=self.turn,
            tags=self.tags,
            health=health,
            retained_blocks=metrics.retained_blocks,
            awaited=load.awaited(now),
        )

    def is_full(self, view: WorkerView) -> bool:
        """Whether one more request would wait in the engine for another one to end."""
        places = self.source.info.max_running
        in_flight = view.prefill_requests + view.decode_requests
        return view.waiting > 0 or (places is not None and in_flight >= places)

    def _forget_load_before(self, time: float) -> None:
        while self._routed and self._routed[0].time < time:
            self._routed_blocks -= self._routed.popleft().new_blocks
