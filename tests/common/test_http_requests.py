"""What requests over HTTP are refused for, and what their responses carry, in process."""

import asyncio
import ipaddress
import logging
from collections.abc import AsyncIterator
from typing import Any

from common.http_errors import EXCEPTION_HANDLERS, outcome
from common.http_requests import guarded, read_body, refuse_other_sites, with_request_id
from common.protocol import PipelineError

import httpx
import pytest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Message

LIMIT = 100
TIMEOUT_S = 0.2


async def upload(request: Request) -> Response:
    refuse_other_sites(request)
    body = await read_body(request, LIMIT, TIMEOUT_S)
    return PlainTextResponse(f"{len(body)}")


async def broken(request: Request) -> Response:
    raise KeyError("secret")


async def full(request: Request) -> Response:
    raise PipelineError("overloaded", "Try again later.")


async def busy(request: Request) -> Response:
    raise PipelineError("conflict", "Another run has the session.")


ROUTES = [
    Route("/", upload, methods=["POST"]),
    Route("/broken", broken),
    Route("/full", full),
    Route("/busy", busy),
]
APP = with_request_id(Starlette(routes=ROUTES, exception_handlers=EXCEPTION_HANDLERS))


def client(**options: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(APP, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost:8000", **options)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/", 200),
        ("GET", "/", 405),
        ("GET", "/nothing", 404),
        ("GET", "/broken", 500),
        ("GET", "/full", 429),
        ("GET", "/busy", 409),
    ],
)
async def test_every_response_has_a_request_id(method: str, path: str, status: int) -> None:
    async with client() as http:
        responses = [await http.request(method, path) for _ in range(2)]
    assert [response.status_code for response in responses] == [status] * 2
    ids = {response.headers["x-request-id"] for response in responses}
    assert len(ids) == 2
    if status != 200:
        assert responses[0].json()["error"].keys() == {"message", "type", "param", "code"}
        assert "secret" not in responses[0].text
    assert ("retry-after" in responses[0].headers) == (status == 429)


async def test_the_log_names_the_request(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with client() as http:
        for path in ("/nothing", "/broken", "/full"):
            caplog.clear()
            request_id = (await http.get(path)).headers["x-request-id"]
            records = [record for record in caplog.records if record.name == "pipeline"]
            assert [vars(record)["request_id"] for record in records] == [request_id]


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({}, True),
        ({"origin": "http://localhost:8000"}, True),
        ({"origin": "http://evil.example"}, False),
        ({"origin": "http://localhost:9000"}, False),
        ({"origin": "null"}, False),
        ({"origin": "http://evil.example", "content-type": "text/plain"}, False),
        ({"content-type": "application/x-www-form-urlencoded"}, True),
        # Behind a proxy that names its own host; the browser still knows what site it is.
        ({"origin": "https://chat.example", "sec-fetch-site": "same-origin"}, True),
        ({"origin": "http://localhost:8000", "sec-fetch-site": "cross-site"}, False),
        ({"origin": "http://localhost:9000", "sec-fetch-site": "same-site"}, False),
        ({"sec-fetch-site": "none"}, True),
    ],
)
async def test_pages_of_other_sites_are_refused(headers: dict[str, str], allowed: bool) -> None:
    """Any page may post text/plain to localhost; curl and the chat page must go on working."""
    async with client(headers=headers) as http:
        response = await http.post("/", content=b"{}")
    assert response.status_code == (200 if allowed else 403)


EVERYWHERE = str(ipaddress.IPv4Address(0))


@pytest.mark.parametrize(
    ("host", "bound", "names", "known"),
    [
        ("localhost:8000", "127.0.0.1", (), True),
        ("LocalHost", "127.0.0.1", (), True),
        ("localhost.:8000", "127.0.0.1", (), True),
        ("chat.localhost:8000", "127.0.0.1", (), True),
        ("127.0.0.1:8000", "127.0.0.1", (), True),
        ("192.168.1.7", "127.0.0.1", (), True),
        ("[::1]:8000", "::1", (), True),
        ("[::1]", "::1", (), True),
        ("box.lan:8000", "Box.lan", (), True),
        ("box.lan:8000", "127.0.0.1", ("other.lan", "BOX.lan"), True),
        ("box.lan:8000", EVERYWHERE, (), True),
        ("box.lan:8000", "::", (), True),
        ("box.lan", EVERYWHERE, ("box.lan",), True),
        ("evil.example:8000", "127.0.0.1", (), False),
        ("evil.example", EVERYWHERE, ("box.lan",), False),
        ("localhost.evil.example", "127.0.0.1", (), False),
        ("evillocalhost", "127.0.0.1", (), False),
        ("127.0.0.1.evil.example", "127.0.0.1", (), False),
        ("[::1].evil.example", "127.0.0.1", (), False),
        ("evil.example:80:80", "127.0.0.1", (), False),
        ("", "127.0.0.1", (), False),
        ("\xff", "127.0.0.1", (), False),
    ],
)
async def test_only_known_hosts_are_served(
    host: str, bound: str, names: tuple[str, ...], known: bool
) -> None:
    """To the browser, a page whose name resolves to our address is a page of ours."""
    app = guarded(Starlette(routes=ROUTES, exception_handlers=EXCEPTION_HANDLERS), bound, names)
    headers = [(b"host", host.encode("latin-1")), (b"sec-fetch-site", b"same-origin")]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as http:
        request = http.build_request("POST", "http://127.0.0.1:8000/", content=b"{}")
        request.headers = httpx.Headers(headers)
        for _ in range(2):
            response = await http.send(request)
            assert response.status_code == (200 if known else 403)
            assert "x-request-id" in response.headers
            if not known:
                error = response.json()["error"]
                assert error["type"] == "invalid_request_error"
                assert "--allowed-host" in error["message"]


async def test_a_body_over_the_limit() -> None:
    async def parts() -> AsyncIterator[bytes]:
        for _ in range(11):
            yield b"0123456789"

    async with client() as http:
        assert (await http.post("/", content=b"x" * LIMIT)).text == "100"
        assert (await http.post("/", content=b"x" * (LIMIT + 1))).status_code == 413
        assert (await http.post("/", content=parts())).status_code == 413


async def test_a_body_that_does_not_come() -> None:
    """It gets a 408, and the rest of it does not keep the connection open."""
    gone = asyncio.Event()

    async def parts() -> AsyncIterator[bytes]:
        yield b"{"
        await gone.wait()

    async with client() as http:
        response = await http.post("/", content=parts())
    assert response.status_code == 408
    assert response.headers["connection"] == "close"
    assert "within 0.2 s" in response.json()["error"]["message"]


async def test_a_client_that_leaves_during_the_upload(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    messages: list[Message] = [
        {"type": "http.request", "body": b"{", "more_body": True},
        {"type": "http.disconnect"},
    ]
    sent: list[Message] = []

    async def receive() -> Message:
        return messages.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": []}
    await APP(scope, receive, send)
    assert sent[0]["status"] == 499
    assert "left before the whole request" in caplog.text


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (PipelineError("conflict", "busy"), (409, "conflict")),
        (PipelineError("not_found", "no such response"), (404, "not_found")),
        (PipelineError("too_large", ""), (413, "too_large")),
        (HTTPException(408), (408, "invalid_request")),
        (ClientDisconnect(), (499, "cancelled")),
        (asyncio.CancelledError(), (499, "cancelled")),
        (GeneratorExit(), (499, "cancelled")),
        (KeyError(), (500, "internal")),
    ],
)
def test_what_a_failed_request_counts_as(error: BaseException, expected: tuple[int, str]) -> None:
    assert outcome(error) == expected
