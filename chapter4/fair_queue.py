"""Requests that wait, in an order that is fair to tenants: start-time fair queueing.

Each tenant has a tag, and the tenant with the lowest one goes first; that moves its tag on by
what its request costs. A tenant that begins to wait starts at the tag of whoever went last, so
it neither waits for what others had before it came nor saves up for later. Source: Goyal, Vin
and Cheng, Start-time Fair Queuing, SIGCOMM 1996.
"""

import bisect
import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

QueueOrder = Literal["fifo", "shortest"]

REMEMBERED_TENANTS = 1000  # of those that went lately and have nothing waiting


class Group(NamedTuple):
    """Requests that may go to the same engines; those `at_once` even if they are saturated."""

    model: str = ""
    excluded: frozenset[int] = frozenset()
    at_once: bool = False


@dataclass(eq=False, slots=True)
class Queued:
    """A request that waits; times are in seconds of any clock that only goes forward.

    `cost` is what it takes, in tokens, `prefill_tokens` the part that comes before its first
    token, which cannot come in time if it is still here after `start_by`. `number` tells it apart
    and grows with each one. One that is `returning` goes on with a task.
    """

    number: int
    arrived: float
    tenant: str = ""
    priority: int = 0
    cost: float = 1.0
    prefill_tokens: float = 0.0
    start_by: float = float("inf")
    group: Group = field(default_factory=Group)
    returning: bool = False


@dataclass(eq=False, slots=True)
class _Tenant:
    tag: float
    waiting: list[tuple[float, int, Queued]] = field(default_factory=list)  # sorted


class FairQueue:
    """The waiting requests of one priority; a tenant's own are in the given order."""

    def __init__(self, order: QueueOrder) -> None:
        self._order = order
        self._tenants: dict[str, _Tenant] = {}
        self._tag = 0.0  # that of the tenant that went last
        self._size = 0
        self._idle = 0  # tenants that have nothing waiting

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Queued]:
        for tenant in self._tenants.values():
            for _, _, request in tenant.waiting:
                yield request

    def add(self, request: Queued) -> None:
        tenant = self._tenants.get(request.tenant)
        if tenant is None:
            tenant = self._tenants[request.tenant] = _Tenant(self._tag)
        elif not tenant.waiting:
            self._idle -= 1
            tenant.tag = max(tenant.tag, self._tag)
        bisect.insort(tenant.waiting, self._entry(request))
        self._size += 1

    def remove(self, request: Queued) -> None:
        """It does not wait any more, and has cost nothing."""
        tenant = self._tenants[request.tenant]
        del tenant.waiting[bisect.bisect_left(tenant.waiting, self._entry(request))]
        self._size -= 1
        if not tenant.waiting:
            self._idle += 1
            if self._idle > 2 * REMEMBERED_TENANTS:  # seldom: it goes through all of them
                self._forget_idle()

    def take(self, may_go: Callable[[Queued], bool]) -> Queued | None:
        """The next of those that may go; it waits no longer, and its tenant has had its cost."""
        waiting = [tenant for tenant in self._tenants.values() if tenant.waiting]
        for tenant in sorted(waiting, key=lambda tenant: (tenant.tag, tenant.waiting[0][1])):
            for _, _, request in tenant.waiting:
                if may_go(request):
                    self._tag = max(self._tag, tenant.tag)
                    tenant.tag += request.cost
                    self.remove(request)
                    return request
        return None

    def waiting(self, tenant: str) -> int:
        """How many of a tenant's requests wait."""
        return len(self._tenants[tenant].waiting) if tenant in self._tenants else 0

    def tenants(self) -> dict[str, int]:
        """How many requests wait, by tenant."""
        return {
            name: len(tenant.waiting) for name, tenant in self._tenants.items() if tenant.waiting
        }

    def last_of(self, tenant: str) -> Queued:
        """Of a tenant's requests that wait, the one that would go last."""
        return self._tenants[tenant].waiting[-1][2]

    def _entry(self, request: Queued) -> tuple[float, int, Queued]:
        rank = request.prefill_tokens if self._order == "shortest" else 0.0
        return rank, request.number, request

    def _forget_idle(self) -> None:
        """Who has nothing waiting matters only while its tag is ahead."""
        idle = {name: tenant.tag for name, tenant in self._tenants.items() if not tenant.waiting}
        ahead = [name for name, tag in idle.items() if tag > self._tag]
        kept = heapq.nlargest(REMEMBERED_TENANTS, ahead, key=idle.__getitem__)
        for name in idle.keys() - set(kept):
            del self._tenants[name]
        self._idle = len(kept)
