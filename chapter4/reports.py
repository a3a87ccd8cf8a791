"""What the processor tells the router about the requests that it routed: first tokens, ends."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from chapter4.router_client import ask_router
from common.protocol import PipelineError, to_wire
from common.protocol_routing import ReportKind, RequestReport, RequestReports
from common.telemetry import log

from dynamo.runtime import Client, Context


class Reporter:
    """Sends reports in batches: those that come while one batch is under way are the next one."""

    def __init__(self, router: Client) -> None:
        self._router = router
        self._waiting: list[RequestReport] = []
        self._arrived = asyncio.Event()
        self._sending = asyncio.Lock()
        self._attempts = 0  # under way
        self._idle = asyncio.Event()
        self._idle.set()

    def never_sent(self, request_id: str) -> None:
        """Nobody waits for the router's choice any more, if there is one."""
        self.add(RequestReport(request_id, 0, "failed"))

    def begin(self) -> None:
        """An attempt begins."""
        self._attempts += 1
        self._idle.clear()

    def end(self) -> None:
        """An attempt is over."""
        self._attempts -= 1
        if not self._attempts:
            self._idle.set()

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
        async with self._sending:
            self._arrived.clear()
            reports, self._waiting = self._waiting, []
            if not reports or not self._router.instance_ids():
                return  # with no router there is nobody to tell
            try:
                await ask_router(self._router, to_wire(RequestReports(reports)), dict, Context())
            except PipelineError as error:
                log.warning("%d reports did not reach the router: %s", len(reports), error)

    async def drain(self) -> None:
        """Wait for the attempts under way and tell how they ended.

        To be called before the runtime shuts down: it calls nobody any more while the last
        requests are finished.
        """
        await self._idle.wait()
        await self.send()


class Attempt:
    """One attempt of a request at one engine, from its dispatch to its end."""

    def __init__(self, reporter: Reporter, request_id: str, instance: int) -> None:
        self._reporter = reporter
        self._request_id = request_id
        self._instance = instance
        self._reporter.begin()
        self.sent()

    def sent(self) -> None:
        """The engine gets it only now."""
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
        self._reporter.end()

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
