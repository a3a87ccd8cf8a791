"""The router's queue: strict priorities, tasks before new ones, fair to tenants, bounded.

A request goes before every request of a lower priority, however long that has waited: enough of
a high priority starves the others, until they give up. Within a priority, one that goes on with a
task goes before one that begins: somebody waits for the whole task, and its blocks are cached now.
But of `OVERTAKEN + 1` that go while both wait, one is a new one. Among equals see `fair_queue`.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

from chapter4.fair_queue import FairQueue, Group, Queued, QueueOrder

OVERTAKEN = 3  # times in a row that a new one is


class Rank(NamedTuple):
    """The higher one goes first."""

    priority: int
    returning: bool


class RequestQueue:
    """At most `size` requests that wait, each for at most `timeout_s`."""

    def __init__(self, size: int, timeout_s: float, order: QueueOrder = "fifo") -> None:
        self.size = size
        self._timeout_s, self._order = timeout_s, order
        self._waiting: dict[Queued, None] = {}  # in the order of arrival
        self._classes: dict[Rank, FairQueue] = {}  # none is empty
        self._overtaken: Counter[int] = Counter()  # in a row, by priority
        self._groups: Counter[Group] = Counter()
        self._first_start_by = float("inf")  # or earlier, if that one has gone

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Queued]:
        return iter(self._waiting)

    def __contains__(self, request: Queued) -> bool:
        return request in self._waiting

    @property
    def groups(self) -> list[Group]:
        """Those of the requests that wait."""
        return list(self._groups)

    def add(self, request: Queued) -> Queued | None:
        """Let it wait; returns who has to leave for it, which may be itself.

        When the queue is full, one leaves of the tenant with the most waiting in the lowest
        priority, if that makes room for a higher priority, or for a tenant that has fewer
        waiting; so neither bulk work nor a heavy tenant keeps the others out. It is that
        tenant's last new one, or else its last one. For one that goes on with a task nobody
        leaves but a new one of the same tenant.
        """
        leaves = self._who_leaves(request) if len(self) >= self.size else None
        if leaves is request:
            return request
        if leaves is not None:
            self.remove(leaves)
        self._waiting[request] = None
        self._groups[request.group] += 1
        self._first_start_by = min(self._first_start_by, request.start_by)
        if (rank := _rank(request)) not in self._classes:
            self._classes[rank] = FairQueue(self._order)
        self._classes[rank].add(request)
        return leaves

    def remove(self, request: Queued) -> None:
        """It does not wait any more."""
        self._classes[_rank(request)].remove(request)
        self._forget(request)

    def take(self, may_go: Callable[[Queued], bool]) -> Queued | None:
        """The next of those that may go, which then waits no longer."""
        for rank in sorted(self._classes, key=self._turn, reverse=True):
            request = self._classes[rank].take(may_go)
            if request is not None:
                if rank.returning and Rank(rank.priority, False) in self._classes:
                    self._overtaken[rank.priority] += 1
                else:
                    del self._overtaken[rank.priority]
                self._forget(request)
                return request
        return None

    def too_late(self, now: float, prefill_s: float) -> list[Queued]:
        """Those whose deadline cannot be met, because prefill would begin `prefill_s` from now."""
        if now + prefill_s < self._first_start_by:
            return []
        late = [request for request in self._waiting if request.start_by <= now + prefill_s]
        for request in late:
            self.remove(request)
        starts = (request.start_by for request in self._waiting)
        self._first_start_by = min(starts, default=float("inf"))
        return late

    def timed_out(self, now: float) -> list[Queued]:
        """Those that have waited for too long; they wait no longer."""
        out = []
        while self._waiting and next(iter(self._waiting)).arrived + self._timeout_s <= now:
            out.append(next(iter(self._waiting)))
            self.remove(out[-1])
        return out

    def next_due(self) -> float:
        """When the next one is too late or timed out; inf if nobody waits."""
        if not self._waiting:
            return float("inf")
        return min(next(iter(self._waiting)).arrived + self._timeout_s, self._first_start_by)

    def depths(self) -> dict[int, dict[str, int]]:
        """How many wait, by priority and tenant, the first to go first."""
        depths: dict[int, Counter[str]] = {}
        for rank in sorted(self._classes, reverse=True):
            depths.setdefault(rank.priority, Counter()).update(self._classes[rank].tenants())
        return {priority: dict(tenants) for priority, tenants in depths.items()}

    @property
    def returning(self) -> int:
        """How many of those that wait go on with a task."""
        return sum(len(queue) for rank, queue in self._classes.items() if rank.returning)

    def oldest_wait_s(self, now: float) -> float:
        return now - next(iter(self._waiting)).arrived if self._waiting else 0.0

    def _turn(self, rank: Rank) -> Rank:
        """Its place in the order now: who was overtaken often enough goes first."""
        due = self._overtaken[rank.priority] >= OVERTAKEN
        return Rank(rank.priority, rank.returning != due)

    def _who_leaves(self, request: Queued) -> Queued:
        lowest = min((rank.priority for rank in self._classes), default=None)
        if lowest is None or request.priority < lowest:
            return request
        ranks = (Rank(lowest, False), Rank(lowest, True))
        queues = [self._classes[rank] for rank in ranks if rank in self._classes]
        waiting: Counter[str] = Counter()
        for queue in queues:
            waiting.update(queue.tenants())

        def last_of(tenant: str) -> Queued:
            return next(queue.last_of(tenant) for queue in queues if queue.waiting(tenant))

        longest = max(waiting, key=waiting.__getitem__)
        if request.priority > lowest or waiting[request.tenant] + 1 < waiting[longest]:
            return last_of(longest)
        if request.returning and waiting[request.tenant]:
            own = last_of(request.tenant)
            return request if own.returning else own
        return request

    def _forget(self, request: Queued) -> None:
        del self._waiting[request]
        if not self._classes[_rank(request)]:
            del self._classes[_rank(request)]
        self._groups[request.group] -= 1
        if not self._groups[request.group]:
            del self._groups[request.group]


def _rank(request: Queued) -> Rank:
    return Rank(request.priority, request.returning)
