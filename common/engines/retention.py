"""Finished sequences whose next request is expected: kept while others can be evicted instead."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from common.engines.blocks import CachedSequence

SHARE = 0.5  # of all blocks that may be retained


@dataclass(frozen=True, slots=True)
class _Retained:
    sequence: CachedSequence
    until: float
    taken_up_by: int  # a request that begins with so many of its blocks


class Retention:
    """At most `limit` blocks; beyond them, the oldest retention is lost.

    `blocks` counts those that retained sequences hold, shared ones once. Times are the `clock`'s,
    in seconds.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self.blocks = 0
        self.clock = clock
        self._retained: dict[int, _Retained] = {}  # the oldest first
        self._due = math.inf  # no retention is over before
        self._over = 0.0  # every one is, after

    def __contains__(self, sequence_id: int) -> bool:
        return sequence_id in self._retained

    def blocks_now(self) -> int:
        """`blocks`, to be asked for by any thread; none whose time is over."""
        return self.blocks if self.clock() < self._over else 0

    def add(self, sequence: CachedSequence, retain_s: float, prompt_blocks: int) -> None:
        """Retain what a request with so many full blocks of prompt left, unless it is too much."""
        if len(sequence.blocks) > self.limit:
            return
        self._expire()  # what is over is to cost nobody a retention
        until = self.clock() + retain_s
        taken_up_by = min(prompt_blocks, len(sequence.blocks))
        self._retained[sequence.id] = _Retained(sequence, until, taken_up_by)
        self._due, self._over = min(self._due, until), max(self._over, until)
        for block in sequence.blocks:
            block.retained += 1
            self.blocks += block.retained == 1
        while self.blocks > self.limit:
            self.end(next(iter(self._retained)))

    def end(self, sequence_id: int) -> None:
        """It is a finished sequence like any other, if it was not before."""
        known = self._retained.pop(sequence_id, None)
        for block in () if known is None else known.sequence.blocks:
            block.retained -= 1
            self.blocks -= block.retained == 0

    def taken_up(self, sequence_ids: Iterable[int], matched: int) -> None:
        """A request runs on their first `matched` blocks: the next one, if those are the prompt."""
        if self._retained:
            for id_ in sequence_ids:
                known = self._retained.get(id_)
                if known is not None and matched >= known.taken_up_by:
                    self.end(id_)

    def victim(
        self, finished: Mapping[int, CachedSequence], spared: int | None = None
    ) -> CachedSequence | None:
        """Who is to go next: the least recent one that is not retained, else the oldest that is."""
        if self._retained:
            self._expire()
        for id_, sequence in finished.items():
            if id_ not in self._retained and id_ != spared:
                return sequence
        for id_, known in self._retained.items():
            if id_ != spared:
                self.end(id_)
                return known.sequence
        return None

    def _expire(self) -> None:
        now = self.clock()
        if now < self._due:
            return
        for id_ in [id_ for id_, known in self._retained.items() if known.until <= now]:
            self.end(id_)
        self._due = min((known.until for known in self._retained.values()), default=math.inf)
