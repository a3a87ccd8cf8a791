"""The page /router: what the routers know and decide, as server-sent events from them all.

However many pages are open, each router is watched once, and not at all when none is. A page
that reads too slowly misses updates; the router never waits for it.
"""

import asyncio
import contextlib
import importlib.resources
from collections.abc import AsyncGenerator

from common.http import client_gone
from common.http_requests import refuse_other_sites
from common.protocol import PipelineError, from_wire
from common.protocol_watch import RoutersUp, RouterUpdate
from common.telemetry import log

import msgspec
from dynamo.runtime import Client, Context
from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

PAGE = importlib.resources.files("chapter4").joinpath("static/router.html")
MAX_PAGES = 32
UNREAD_EVENTS = 32  # for each page; about eight seconds of one router
LISTED_CHECK_S = 0.5  # the runtime's client knows of changes, but tells nobody
TOLD_AGAIN_S = 5.0
RETRY_S = 1.0
STREAM_END_S = 2.0

_encode = msgspec.json.Encoder().encode


class RouterPage:
    """Watches the routers for the pages that are open; whoever made it closes it."""

    def __init__(self, routers: Client) -> None:
        self._routers = routers
        self._pages: set[asyncio.Queue[bytes | None]] = set()
        self._watching: asyncio.Task[None] | None = None
        self._up: set[int] = set()
        self._closed = False

    def add_to(self, app: FastAPI) -> None:
        """Serve GET /router and /router/events."""

        @app.get("/router", include_in_schema=False)
        async def page() -> Response:
            return Response(PAGE.read_bytes(), media_type="text/html")

        @app.get("/router/events", include_in_schema=False)
        async def events(http: Request) -> Response:
            refuse_other_sites(http)
            if self._closed:
                raise PipelineError("unavailable", "The frontend is shutting down.")
            if len(self._pages) >= MAX_PAGES:
                message = f"{MAX_PAGES} pages watch the router already; that is the limit."
                raise PipelineError("overloaded", message)
            return _EventStream(self._events())

    async def aclose(self) -> None:
        """End the events of all pages; their requests are then answered."""
        self._closed = True
        for page in self._pages:
            _put(page, None)
        await self._stop_watching()

    async def _events(self) -> AsyncGenerator[bytes, None]:
        page: asyncio.Queue[bytes | None] = asyncio.Queue(UNREAD_EVENTS)
        self._pages.add(page)
        try:
            yield self._routers_up()
            if self._watching is None:
                self._watching = asyncio.create_task(self._watch_all())
            while not self._closed:
                event = await page.get()
                if event is not None:
                    yield event
        finally:
            self._pages.discard(page)
            if not self._pages:
                await self._stop_watching()

    async def _stop_watching(self) -> None:
        task, self._watching = self._watching, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _routers_up(self) -> bytes:
        return _event(RoutersUp([f"{instance:x}" for instance in sorted(self._up)]))

    def _send(self, event: bytes) -> None:
        for page in self._pages:
            _put(page, event)

    async def _watch_all(self) -> None:
        """Watch every router that is listed; never returns."""
        watched: dict[int, asyncio.Task[None]] = {}
        told = 0.0
        clock = asyncio.get_running_loop().time
        try:
            while True:
                listed = set(self._routers.instance_ids())
                for instance in listed - watched.keys():
                    watched[instance] = asyncio.create_task(self._watch(instance))
                for instance in watched.keys() - listed:
                    watched.pop(instance).cancel()
                if clock() - told > TOLD_AGAIN_S:  # that also shows a page that the line is up
                    told = clock()
                    self._send(self._routers_up())
                await asyncio.sleep(LISTED_CHECK_S)
        finally:
            for task in watched.values():
                task.cancel()
            await asyncio.gather(*watched.values(), return_exceptions=True)

    async def _watch(self, instance: int) -> None:
        """Pass on one router's updates; never returns."""
        while True:
            try:
                async with contextlib.aclosing(self._updates(instance)) as updates:
                    async for update in updates:
                        if update.error is not None:
                            raise PipelineError.of(update.error)
                        if instance not in self._up:
                            self._up.add(instance)
                            self._send(self._routers_up())
                        self._send(_event(update))
            except Exception as error:  # the runtime raises nothing more precise
                log.info("router instance %x cannot be watched: %s", instance, error)
            finally:
                if instance in self._up:
                    self._up.discard(instance)
                    self._send(self._routers_up())
            await asyncio.sleep(RETRY_S)

    async def _updates(self, instance: int) -> AsyncGenerator[RouterUpdate, None]:
        context = Context()
        stream = await self._routers.direct({}, instance, annotated=False, context=context)
        try:
            async for item in stream:
                yield from_wire(item, RouterUpdate)
        finally:
            context.stop_generating()
            # One that was dropped would look like a broken router.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STREAM_END_S):
                    async for _ in stream:
                        pass


class _EventStream(Response):
    """Server-sent events; ends when they do or the client closes the connection."""

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__()
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(client_gone(receive))
        try:
            await asyncio.wait([sending, gone], return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for task in (sending, gone):
                task.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)

    async def _send(self, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async with contextlib.aclosing(self.events) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def _put(page: asyncio.Queue[bytes | None], event: bytes | None) -> None:
    if page.full():
        page.get_nowait()
    page.put_nowait(event)


def _event(message: RouterUpdate | RoutersUp) -> bytes:
    return b"data: " + _encode(message) + b"\n\n"
