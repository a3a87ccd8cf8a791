"""What the processor tells the router about the requests that it routed: first tokens, ends."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from common.protocol import to_wire
from common.protocol_routing import ReportKind, RequestReport, RequestReports
from common.telemetry import log

from dynamo.runtime import Client

ROUTER_ANSWER_S = 3.0


class Reporter:
    """Sends reports in batches: those that come while one batch is under way are the next one."""

    def __init__(self, router: Client) -> None:
        self._router = router
        self._waiting: list[RequestReport] = []
        self._arrived = asyncio.Event()

    def add(self, report: RequestReport) -> None:
        self._waiting.append(report)
        self._arrived.set()

    async def keep_sending(self) -> None:
        """Send what arrives; never returns."""
        while True:
            await self._arrived.wait()
            await self.send()

    async def send(self) -> None:
        """Send what waits."""
        self._arrived.clear()
        reports, self._waiting = self._waiting, []
        if not reports or not self._router.instance_ids():
            return  # with no router there is nobody to tell
        try:
            async with asyncio.timeout(ROUTER_ANSWER_S):
                request = to_wire(RequestReports(reports))
                async for _ in await self._router.round_robin(request, annotated=False):
                    pass
        except Exception as error:  # the runtime raises nothing more precise
            log.warning("%d reports did not reach the router: %r", len(reports), error)


class Attempt:
    """One attempt of a request at one engine, from its dispatch to its end."""

    def __init__(self, reporter: Reporter, request_id: str, instance: int) -> None:
        self._reporter = reporter
        self._request_id = request_id
        self._instance = instance
        self._sent = time.monotonic()
        self._first_token: float | None = None
        self._tokens = 0

    def tokens(self, count: int) -> None:
        """So many came."""
        self._tokens += count
        if count and self._first_token is None:
            self._first_token = time.monotonic()
            self._report("first_token", (self._first_token - self._sent) * 1e3)

    def end(self, kind: ReportKind) -> None:
        """It is over: `finished` or `failed`."""
        decoding = 0.0 if self._first_token is None else time.monotonic() - self._first_token
        self._report(kind, decoding * 1e3 / max(self._tokens - 1, 1))

    def _report(self, kind: ReportKind, ms: float) -> None:
        self._reporter.add(RequestReport(self._request_id, self._instance, kind, ms, self._tokens))


@contextlib.asynccontextmanager
async def reporting(router: Client) -> AsyncIterator[Reporter]:
    """A reporter for the length of the block."""
    reporter = Reporter(router)
    task = asyncio.create_task(reporter.keep_sending())
    try:
        yield reporter
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await reporter.send()
