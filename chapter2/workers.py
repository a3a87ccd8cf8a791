"""What the router knows of each engine's load: what the engine says, and what it was just sent."""

import time
from collections import deque
from dataclasses import dataclass, field

from common.protocol import EngineMetrics
from common.protocol_router import Candidate, KvSource

# What was routed counts as load until the engine's own figures include it.
PREDICTED_LOAD_S = 0.1
# A prompt counts as cached where it was sent, so that the next one like it follows; the events
# come when it is computed.
PREDICTED_CACHE_S = 10.0
SILENT_AFTER_S = 3.0


@dataclass(frozen=True, slots=True)
class Routed:
    """A request that was sent to an engine at `time`, and the blocks it will newly use."""

    time: float
    new_blocks: int


@dataclass(eq=False)
class Worker:
    """One engine. `synced`: the index has what it has cached, so it may be chosen."""

    instance: int
    source: KvSource
    synced: bool = False
    failed: bool = False
    heard: float = 0.0
    turn: int = 0
    metrics: EngineMetrics | None = None
    _routed: deque[Routed] = field(default_factory=deque)
    _prefixes: dict[int, float] = field(default_factory=dict)  # until when; oldest first

    def is_silent(self, now: float) -> bool:
        return now - self.heard > SILENT_AFTER_S

    def hear(self, metrics: EngineMetrics) -> None:
        """Take the engine's own figures; they include what was routed a while ago."""
        self.heard = time.monotonic()
        self.metrics = metrics
        while self._routed and self.heard - self._routed[0].time > PREDICTED_LOAD_S:
            self._routed.popleft()

    def expect(self, names: list[int], overlap: int) -> None:
        """A prompt, given by its blocks' names, was routed here; `overlap` of them are cached."""
        now = time.monotonic()
        self._routed.append(Routed(now, len(names) + 1 - overlap))
        for name in names[overlap:]:
            self._prefixes.pop(name, None)
            self._prefixes[name] = now + PREDICTED_CACHE_S
        while self._prefixes:
            oldest, until = next(iter(self._prefixes.items()))
            if until > now:
                break
            del self._prefixes[oldest]

    def forget(self) -> None:
        """The engine failed: nothing that was expected of it will come."""
        self.synced, self.failed = False, True
        self.metrics = None
        self._routed.clear()
        self._prefixes.clear()

    def overlap(self, names: list[int], cached: int) -> int:
        """How many of the prompt's blocks it has or will soon have; `cached` it has for sure."""
        if not self._prefixes:
            return cached
        now = time.monotonic()
        while cached < len(names) and self._prefixes.get(names[cached], 0.0) > now:
            cached += 1
        return cached

    def candidate(self, names: list[int], cached: int) -> Candidate:
        info = self.source.info
        metrics = self.metrics or EngineMetrics(0, 0, 0, info.total_blocks)
        used = metrics.used_blocks + sum(routed.new_blocks for routed in self._routed)
        running, waiting = metrics.running, metrics.waiting
        if waiting:  # a new request joins the queue, if there is one
            waiting += len(self._routed)
        else:
            running += len(self._routed)
        return Candidate(
            instance_id=self.instance,
            worker_id=info.worker_id,
            overlap_blocks=self.overlap(names, cached),
            kv_usage=min(used / metrics.total_blocks, 1.0),
            running=running,
            waiting=waiting,
        )
