"""The events of the router's page: from every router, to every page, at no router's cost."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from chapter3 import router_page
from tests.chapter1.helpers import eventually, http_client
from tests.chapter3.page_server import FIRST_ROUTER, PageServer, deciding, page_server

import httpx
import pytest
import pytest_asyncio

EVENTS = "/router/events"


@pytest_asyncio.fixture
async def server() -> AsyncIterator[PageServer]:
    async with page_server() as server:
        yield server


@pytest_asyncio.fixture
async def client(server: PageServer) -> AsyncIterator[httpx.AsyncClient]:
    async with http_client(server.url) as client:
        yield client


class Events:
    """The events of one page as they arrive."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self._lines = response.aiter_lines()

    async def next(self) -> dict[str, Any]:
        async for line in self._lines:
            if line:
                assert line.startswith("data: ")
                event: dict[str, Any] = json.loads(line.removeprefix("data: "))
                return event
        raise EOFError

    async def until(self, field: str) -> dict[str, Any]:
        """The next event that has something in this field."""
        while not (event := await self.next()).get(field):
            pass
        return event

    async def read_all(self) -> None:
        async for _ in self._lines:
            pass


@asynccontextmanager
async def opened(client: httpx.AsyncClient) -> AsyncIterator[Events]:
    async with client.stream("GET", EVENTS) as response:
        assert response.status_code == 200
        yield Events(response)


async def test_the_page_and_its_headers(client: httpx.AsyncClient) -> None:
    response = await client.get("/router")
    assert response.headers["content-type"].startswith("text/html")
    assert "Content-Security-Policy" in response.text
    async with opened(client) as events:
        headers = events.response.headers
        assert headers["content-type"] == "text/event-stream; charset=utf-8"
        assert headers["cache-control"] == "no-store"


async def test_no_router_is_no_error(server: PageServer, client: httpx.AsyncClient) -> None:
    """The page says so, and shows the router that comes."""
    async with opened(client) as events:
        assert await events.next() == {"routers": []}
        server.routers.add()
        assert await events.until("routers") == {"routers": [f"{FIRST_ROUTER:x}"]}
        assert len((await events.until("workers"))["workers"]) == 4


async def test_several_routers(server: PageServer, client: httpx.AsyncClient) -> None:
    first, second = server.routers.add(), server.routers.add()
    second.decide()
    async with opened(client) as events:
        update = await events.until("decisions")
        assert update["router"] == f"{FIRST_ROUTER + 1:x}"
        assert update["decisions"][0]["request_id"] == "request1/0"
        del server.routers.routers[FIRST_ROUTER + 1]
        while await events.until("routers") != {"routers": [f"{FIRST_ROUTER:x}"]}:
            pass
        first.decide()
        assert (await events.until("decisions"))["router"] == f"{FIRST_ROUTER:x}"


async def test_a_router_is_watched_once_and_only_while_pages_are_open(
    server: PageServer, client: httpx.AsyncClient
) -> None:
    server.routers.add()
    assert server.routers.watching == 0
    async with opened(client) as one, opened(client) as other:
        await one.until("workers")
        await other.until("workers")
        assert (server.routers.watching, server.routers.calls) == (1, 1)
    await eventually(lambda: server.routers.watching == 0)
    async with opened(client) as again:
        await again.until("workers")
        assert server.routers.calls == 2


async def test_a_router_that_breaks_off_is_watched_again(
    server: PageServer, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_page, "RETRY_S", 0.01)
    router = server.routers.add()
    async with opened(client) as events:
        await events.until("workers")
        await router.watched.aclose()
        while (await events.next()).get("routers") != []:
            pass
        router.watched._closed.clear()
        await events.until("routers")
        await events.until("workers")


async def test_only_so_many_pages(
    server: PageServer, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_page, "MAX_PAGES", 1)
    async with opened(client):
        response = await client.get(EVENTS)
        assert response.status_code == 429
        assert "1 pages watch the router already" in response.json()["error"]["message"]

    async def open_again() -> bool:
        async with client.stream("GET", EVENTS) as response:
            return response.status_code == 200

    await eventually(open_again)


async def test_pages_of_other_sites_are_refused(client: httpx.AsyncClient) -> None:
    response = await client.get(EVENTS, headers={"sec-fetch-site": "cross-site"})
    assert response.status_code == 403


async def test_a_page_that_does_not_read_holds_nobody_up(server: PageServer) -> None:
    """It misses updates; another page gets them all, and memory stays bounded."""
    router = server.routers.add(engines=8)
    host, port = server.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port), limit=1)
    writer.write(f"GET {EVENTS} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
    await writer.drain()
    async with http_client(server.url) as client, opened(client) as events:
        await eventually(lambda: len(server.page._pages) == 2)
        async with deciding(router, 100):
            for _ in range(8):
                await events.until("decisions")
        assert all(page.qsize() <= router_page.UNREAD_EVENTS for page in server.page._pages)
    writer.close()
    await eventually(lambda: not server.page._pages)


async def test_unread_events_are_bounded() -> None:
    page: asyncio.Queue[bytes | None] = asyncio.Queue(3)
    for event in (b"1", b"2", b"3", b"4"):
        router_page._put(page, event)
    assert [page.get_nowait() for _ in range(3)] == [b"2", b"3", b"4"]


async def test_the_events_end_when_the_frontend_drains(
    server: PageServer, client: httpx.AsyncClient
) -> None:
    """A page would hold up the drain of the HTTP server for ever."""
    server.routers.add()
    async with opened(client) as events:
        await events.until("workers")
        await server.page.aclose()
        await asyncio.wait_for(events.read_all(), 10)
        assert server.routers.watching == 0
        assert (await client.get(EVENTS)).status_code == 503
        await asyncio.wait_for(server.server.drain(), 10)
