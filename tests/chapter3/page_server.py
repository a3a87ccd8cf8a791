"""The router's page without a pipeline: real routers' logs and page, on a server of the test's."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from chapter3.decision import PolicyInUse
from chapter3.router_page import RouterPage
from chapter3.selector import Selector
from chapter3.snapshot import Snapshot
from chapter3.watch import Watched
from chapter3.workers import Worker
from common.http import HttpServer, http_server, listen
from common.http_errors import EXCEPTION_HANDLERS
from common.http_requests import with_request_id
from common.protocol import EngineInfo, EngineMetrics
from common.protocol_router import KvSource
from common.protocol_routing import RequestReport, RouteRequest

from dynamo.runtime import Context
from fastapi import FastAPI

MODEL = "a-model"
FIRST_ROUTER = 2**62  # as large as real instance ids
FIRST_ENGINE = 2**61
AT_ONCE = 20


def in_two_terms(snapshot: Snapshot) -> list[dict[str, float]]:
    """A policy that stays as it is, whatever becomes of ours."""
    return [
        {"queue": -worker.prefill_s, "prefill": -worker.new_tokens / 8000}
        for worker in snapshot.workers
    ]


class FakeRouter:
    """One router's decisions, and the handler of `router.watch` that shows them."""

    def __init__(self, number: int, engines: int, shadow: str) -> None:
        self.selector = Selector(PolicyInUse("in_two_terms", in_two_terms))
        self.selector.shadow = PolicyInUse.named(shadow) if shadow else None
        self.watched = Watched(self.selector)
        self.watched.router = FIRST_ROUTER + number
        for worker_id in range(engines):
            info = EngineInfo(MODEL, "simulated", 8192, 16, 1000, worker_id)
            worker = Worker(
                FIRST_ENGINE + worker_id,
                KvSource(info, "topic", "tcp://events", "tcp://metrics"),
                synced=True,
            )
            worker.hear(EngineMetrics(worker_id, 0, 100 * worker_id, 1000), time.monotonic())
            self.selector.workers[worker.instance] = worker
        self.decided = 0

    def decide(self, tokens: int = 100, *, end: bool = True) -> None:
        """Route a request whose answer has come at once, or not (`end`)."""
        now = time.monotonic()
        for worker in self.selector.workers.values():
            worker.heard = now
        self.decided += 1
        request_id = f"request{self.decided}/0"
        prompt = [*range(64), *range(self.decided, self.decided + tokens - 64)]
        decision = self.selector.select(RouteRequest(prompt, MODEL, request_id=request_id), now)
        self.watched.add(request_id, decision)
        if end:
            self.selector.active.finish(request_id)
            instance = decision.worker.instance_id
            first = RequestReport(request_id, instance, "first_token", 12.5)
            last = RequestReport(request_id, instance, "finished", 5.0, 7)
            for report in (first, last):
                self.watched.log.report(report)


@dataclass
class FakeRouters:
    """Stands in for the runtime's client of `router.watch`."""

    routers: dict[int, FakeRouter] = field(default_factory=dict)
    watching: int = 0
    calls: int = 0

    def instance_ids(self) -> list[int]:
        return list(self.routers)

    async def direct(
        self, request: Any, instance: int, *, annotated: bool, context: Context
    ) -> AsyncGenerator[Any, None]:
        self.calls += 1
        return self._stream(self.routers[instance], context)

    async def _stream(self, router: FakeRouter, context: Context) -> AsyncGenerator[Any, None]:
        self.watching += 1
        try:
            async for item in router.watched.watch({}, context):
                yield item
        finally:
            self.watching -= 1

    def add(self, engines: int = 4, shadow: str = "least_loaded") -> FakeRouter:
        router = FakeRouter(len(self.routers), engines, shadow)
        self.routers[router.watched.router] = router
        return router


@dataclass
class PageServer:
    page: RouterPage
    server: HttpServer
    routers: FakeRouters

    @property
    def url(self) -> str:
        return self.server.url


@asynccontextmanager
async def page_server() -> AsyncIterator[PageServer]:
    """The page and its events, with no router yet."""
    routers = FakeRouters()
    page = RouterPage(routers)  # type: ignore[arg-type]
    app = FastAPI(exception_handlers=EXCEPTION_HANDLERS)
    page.add_to(app)
    async with http_server(with_request_id(app), listen("127.0.0.1", 0)) as server:
        try:
            yield PageServer(page, server, routers)
        finally:
            await page.aclose()


@asynccontextmanager
async def deciding(router: FakeRouter, per_s: float) -> AsyncIterator[None]:
    """So many decisions a second while the block lasts, or what the machine can do."""

    async def decide() -> None:
        began, done = time.monotonic(), 0
        while True:
            due = int((time.monotonic() - began) * per_s)
            due = min(due, done + AT_ONCE)  # the server has its turn as well
            for _ in range(done, due):
                router.decide()
            done = due
            await asyncio.sleep(0.005)

    task = asyncio.create_task(decide())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
