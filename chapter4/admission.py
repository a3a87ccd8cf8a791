"""Admission: requests wait in the router while every engine that may take them is saturated.

Decides when a request is routed; to which engine is the policy's decision, made in the same
moment. Needs no network and no clock. Each router has a queue of its own: with several, the
order holds among the requests of one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from chapter4.agent_hints import is_returning
from chapter4.decision import Decision
from chapter4.drain_rate import DrainRate
from chapter4.fair_queue import Group, Queued, QueueOrder
from chapter4.request_queue import RequestQueue
from chapter4.saturation import Limits, is_saturated
from chapter4.selector import Selector
from common.protocol import PipelineError
from common.protocol_routing import RouteRequest

# A router that has just started knows its engines in a moment.
ENGINE_WAIT_S = 2.0
FIRST_OF_ALL = 2**31  # the priority of a request that was routed before

Refusal = Literal["queue_full", "displaced", "deadline", "timeout", "no_engine"]


@dataclass(frozen=True)
class QueueSettings:
    """How many requests may wait, for how long, and in which order."""

    size: int = 1024
    timeout_s: float = 30.0
    order: QueueOrder = "fifo"
    limits: Limits | None = field(default_factory=Limits)  # None: nothing ever waits


@dataclass(eq=False, slots=True)
class Ticket:
    """A request and, when it is settled, its `outcome` and how long it waited for that.

    A request that is refused has a `refusal` and, as its outcome, what to tell the client.
    """

    wanted: RouteRequest
    group: Group
    queued: Queued
    outcome: Decision | PipelineError | None = None
    refusal: Refusal | None = None
    waited_s: float = 0.0


class Admission:
    """`on_settled` hears of each request that is settled, also of one that is so at once."""

    def __init__(
        self,
        selector: Selector,
        settings: QueueSettings,
        on_settled: Callable[[Ticket], None] = lambda ticket: None,
    ) -> None:
        self.queue = RequestQueue(settings.size, settings.timeout_s, settings.order)
        self._selector = selector
        self._settings = settings
        self._on_settled = on_settled
        self._tickets: dict[Queued, Ticket] = {}
        self._drained = DrainRate()
        self._no_engine: dict[Group, tuple[float, PipelineError]] = {}  # since when, and why
        self._number = 0

    def offer(self, wanted: RouteRequest, now: float) -> Ticket:
        """A request comes. Its ticket is settled now or, while it waits, by `drain`."""
        self.drain(now)  # nobody overtakes who waits
        group = Group(
            wanted.model, frozenset((*wanted.excluded, *wanted.failed)), wanted.admitted
        )  # fmt: skip
        self._number += 1
        priority = FIRST_OF_ALL if wanted.admitted else wanted.hints.priority
        queued = Queued(
            self._number,
            now,
            wanted.hints.tenant,
            priority,
            group=group,
            returning=is_returning(wanted.hints),
        )
        ticket = Ticket(wanted, group, queued)
        may_go = self._may_go(group, now)
        has_deadline = wanted.hints.deadline_ms is not None and not wanted.admitted
        if (has_deadline or not may_go) and not self._estimate(ticket, now):
            self._refuse(ticket, "deadline", now)
        elif may_go:
            self._route(ticket, now)
        else:
            self._tickets[queued] = ticket
            leaves = self.queue.add(queued)
            if leaves is not None:
                reason: Refusal = "queue_full" if leaves is queued else "displaced"
                self._refuse(self._tickets[leaves], reason, now)
        return ticket

    def drain(self, now: float) -> None:
        """Something may have changed: route what can go, refuse what has waited in vain."""
        if not self.queue:
            self._no_engine.clear()
            return
        for queued in self.queue.timed_out(now):
            self._refuse(self._tickets[queued], "timeout", now)
        for queued in self.queue.too_late(now, self._prefill_s(now)):
            self._refuse(self._tickets[queued], "deadline", now)
        while (next_one := self._take(now)) is not None:
            self._drained.add(now)
            self._route(self._tickets[next_one], now)
        self._give_up_without_engine(now)

    def cancel(self, ticket: Ticket) -> None:
        """The client has left."""
        if ticket.queued in self.queue:
            self.queue.remove(ticket.queued)
        self._tickets.pop(ticket.queued, None)

    def next_due(self) -> float:
        """When to `drain` even if nothing has changed; inf if nobody waits."""
        give_up = [until for _, until in self._without_engine()]
        return min([self.queue.next_due(), *give_up])

    def _take(self, now: float) -> Queued | None:
        free = {group for group in self.queue.groups if self._may_go(group, now)}
        return self.queue.take(lambda request: request.group in free) if free else None

    def _may_go(self, group: Group, now: float) -> bool:
        """Whether an engine may have a request of the group now."""
        try:
            workers = self._selector.eligible(group.model, group.excluded, now)
        except PipelineError as error:
            self._no_engine.setdefault(group, (now, error))
            return False
        self._no_engine.pop(group, None)
        load, limits = self._selector.active.load, self._settings.limits
        return (
            limits is None
            or group.at_once
            or not all(
                is_saturated(worker, load(worker.instance), limits, now) for worker in workers
            )
        )

    def _estimate(self, ticket: Ticket, now: float) -> bool:
        """What it will take; whether its first token could come in time if it went now."""
        wanted, queued = ticket.wanted, ticket.queued
        try:
            views = self._selector.views(wanted, now, ticket.group.excluded)
        except PipelineError:
            return True  # an engine may yet come
        queued.prefill_tokens = min(view.new_tokens for view in views)
        # Not what the client expects of the output: it would pay to say little.
        output_tokens = self._selector.mean_output_tokens
        if wanted.max_tokens is not None:
            output_tokens = min(output_tokens, wanted.max_tokens)
        queued.cost = max(queued.prefill_tokens + output_tokens, 1.0)
        if wanted.hints.deadline_ms is None or wanted.admitted:
            return True
        left_s = (wanted.hints.deadline_ms - wanted.waited_ms) / 1e3
        queued.start_by = now + left_s - min(view.own_prefill_s for view in views)
        soonest = min(view.place_s + view.prefill_s + view.own_prefill_s for view in views)
        return soonest < left_s

    def _prefill_s(self, now: float) -> float:
        """How long any request will wait at least for its prefill to begin."""
        loads = (self._selector.active.load(instance) for instance in self._selector.workers)
        return min((load.prefill_s(now) for load in loads), default=0.0)

    def _without_engine(self) -> Iterator[tuple[Ticket, float]]:
        """The requests that no engine can take, and until when they wait for one."""
        if self._no_engine:
            for queued in self.queue:
                ticket = self._tickets[queued]
                if ticket.group in self._no_engine:
                    since, _ = self._no_engine[ticket.group]
                    yield ticket, max(since, queued.arrived) + ENGINE_WAIT_S

    def _give_up_without_engine(self, now: float) -> None:
        for ticket, until in list(self._without_engine()):
            if until <= now:
                self.queue.remove(ticket.queued)
                ticket.outcome = self._no_engine[ticket.group][1]
                self._settle(ticket, now, "no_engine")
        for group in self._no_engine.keys() - set(self.queue.groups):
            del self._no_engine[group]

    def _route(self, ticket: Ticket, now: float) -> None:
        try:
            ticket.outcome = self._selector.select(ticket.wanted, now, ticket.group.excluded)
        except PipelineError as error:
            ticket.outcome = error
            self._settle(ticket, now, "no_engine")
        else:
            self._settle(ticket, now)

    def _refuse(self, ticket: Ticket, refusal: Refusal, now: float) -> None:
        retry_after_s = self._drained.retry_after_s(len(self.queue), now)
        message = refusal_message(ticket, refusal, now, len(self.queue))
        ticket.outcome = PipelineError("overloaded", message, retry_after_s=retry_after_s)
        self._settle(ticket, now, refusal)

    def _settle(self, ticket: Ticket, now: float, refusal: Refusal | None = None) -> None:
        self._tickets.pop(ticket.queued, None)
        ticket.waited_s, ticket.refusal = now - ticket.queued.arrived, refusal
        self._on_settled(ticket)


def refusal_message(ticket: Ticket, refusal: Refusal, now: float, depth: int) -> str:
    """Why it is refused, in words for the client."""
    waited_s = now - ticket.queued.arrived
    if refusal == "deadline":
        passed_ms = ticket.wanted.waited_ms + waited_s * 1e3
        return (
            f"The first token cannot come within {ticket.wanted.hints.deadline_ms:g} ms: "
            f"{passed_ms:.0f} ms have passed, and no engine could compute the prompt in time."
        )
    busy = f"All engines are busy and {depth} requests wait"
    if refusal == "timeout":
        return (
            f"All engines are busy; this request has waited for {waited_s:.0f} s. Try again later."
        )
    if refusal == "queue_full":
        return f"{busy}, which is as many as may."
    return f"{busy}; one of a higher priority or of a tenant with fewer took this one's place."
