"""Waits for `Admission` on the event loop: a request's place in the queue as an awaitable."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

from chapter4.admission import Admission, QueueSettings, Ticket
from chapter4.admission_metrics import AdmissionMetrics
from chapter4.decision import Decision
from chapter4.selector import Selector
from common.protocol import PipelineError
from common.protocol_routing import RouteRequest
from common.protocol_watch import WatchedQueue

from dynamo.runtime import Context

KEEP_ALIVE_S = 1.0  # processors take a router that is silent for 3 s for one that hangs
MAX_SLEEP_S = 60.0
WATCHED_TENANTS = 10


class AdmissionGate:
    """Made by `admitting`; `changed` must be called when there may be room for a request."""

    def __init__(self, selector: Selector, settings: QueueSettings) -> None:
        self.admission = Admission(selector, settings, self._settled)
        self.metrics = AdmissionMetrics(self.admission)
        self._waiting: dict[Ticket, asyncio.Future[None]] = {}
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._drain_is_due = False
        self.refused = 0

    def offer(self, wanted: RouteRequest) -> Ticket:
        """A request comes; see `Admission.offer`. To be followed by `wait` at once."""
        ticket = self.admission.offer(wanted, time.monotonic())
        self._set_timer()
        return ticket

    async def wait(self, ticket: Ticket, context: Context) -> AsyncGenerator[None, None]:
        """Yields now and then until the request is settled; ends early if its client leaves."""
        if ticket.outcome is not None:
            return
        settled = self._waiting[ticket] = self._loop.create_future()
        left = asyncio.ensure_future(context.async_killed_or_stopped())
        try:
            while True:
                done, _ = await asyncio.wait(
                    [settled, left], timeout=KEEP_ALIVE_S, return_when=asyncio.FIRST_COMPLETED
                )
                if done:
                    return
                yield
        finally:
            left.cancel()
            self._cancel(ticket)

    def _cancel(self, ticket: Ticket) -> None:
        if ticket.outcome is None:
            self.admission.cancel(ticket)
            self.metrics.count_cancelled()
        self._waiting.pop(ticket, None)

    def changed(self) -> None:
        """An engine's load changed, or one came, left or recovered: somebody may go."""
        if self.admission.queue and not self._drain_is_due:
            self._drain_is_due = True
            self._loop.call_soon(self._drain)

    def watched(self) -> WatchedQueue:
        """The queue as it is now, with the tenants that have most requests in it."""
        queue, tenants, priorities = self.admission.queue, Counter[str](), Counter[str]()
        for priority, by_tenant in queue.depths().items():
            tenants.update(by_tenant)
            priorities[str(priority)] = sum(by_tenant.values())
        return WatchedQueue(
            waiting=len(queue),
            limit=queue.size,
            oldest_ms=queue.oldest_wait_s(time.monotonic()) * 1e3,
            waiting_by_priority=priorities,
            waiting_by_tenant=dict(tenants.most_common(WATCHED_TENANTS)),
            refused=self.refused,
            returning=queue.returning,
        )

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _drain(self) -> None:
        self._drain_is_due = False
        self.admission.drain(time.monotonic())
        self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.admission.queue:
            sleep_s = min(self.admission.next_due() - time.monotonic(), MAX_SLEEP_S)
            self._timer = self._loop.call_later(max(sleep_s, 0.0), self._drain)

    def _settled(self, ticket: Ticket) -> None:
        self.metrics.observe(ticket)
        self.refused += ticket.refusal is not None
        future = self._waiting.pop(ticket, None)
        if future is not None and not future.done():
            future.set_result(None)


def decision_of(ticket: Ticket) -> Decision:
    """The decision about a request for which nobody waits any longer.

    Raises:
        PipelineError: it was refused: kind `overloaded`, or `unavailable` for want of an engine
            or because its client has left.
    """
    if isinstance(ticket.outcome, Decision):
        return ticket.outcome
    raise ticket.outcome or PipelineError("unavailable", "The client has left while it waited.")


@asynccontextmanager
async def admitting(selector: Selector, settings: QueueSettings) -> AsyncIterator[AdmissionGate]:
    """A gate for the length of the block; `selector.changed` is to call it."""
    gate = AdmissionGate(selector, settings)
    selector.changed = gate.changed
    try:
        yield gate
    finally:
        gate.close()
