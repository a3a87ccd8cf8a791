"""`http_get` reaches the hosts that the operator allows, and nothing else."""

import asyncio
import gzip
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote_from_bytes, unquote_to_bytes

from chapter4 import http_get as module
from chapter4.http_get import AllowedHost, http_get_tool
from chapter4.run_tool import ToolResult
from tests.chapter4.tool_calls import call

import pytest


class Pages(BaseHTTPRequestHandler):
    """Pages by path; `requests` are those that came."""

    requests: list[tuple[str, str | None]] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.requests.append((self.path, self.headers["host"]))
        page = getattr(self, "page_" + self.path.strip("/").partition("?")[0], None)
        if page is None:
            self.send(404, b"no such page")
        else:
            page()

    def send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"content_type": "text/plain; charset=utf-8", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def page_hello(self) -> None:
        self.send(200, "h\u00e9llo".encode())

    def page_latin(self) -> None:
        self.send(200, "h\u00e9llo".encode("latin-1"), content_type="text/html; charset=latin-1")

    def page_charset(self) -> None:
        charset, _, body = unquote_to_bytes(self.path.partition("?")[2]).partition(b":")
        self.send(200, body, content_type=f"text/html; charset={charset.decode()}")

    def page_punycode(self) -> None:
        self.send(200, b"a" * 2**19 + b"-" + b"b" * 2**19, content_type="text/x;charset=Punycode")

    def page_image(self) -> None:
        self.send(200, b"\x89PNG", content_type="image/png")

    def page_bomb(self) -> None:
        self.send(200, gzip.compress(b"x" * 10_000_000), content_encoding="gzip")

    def page_endless(self) -> None:
        self.send(200, b"")
        try:
            while True:
                self.wfile.write(b"x" * 65536)
        except OSError:
            pass

    def page_loop(self) -> None:
        self.send(302, b"", location="/loop")

    def page_moved(self) -> None:
        self.send(301, b"", location="hello")

    def page_away(self) -> None:
        self.send(307, b"", location=f"http://localhost:{self.connection.getsockname()[1]}/hello")

    def page_file(self) -> None:
        self.send(302, b"", location="file:///etc/passwd")

    def page_busy(self) -> None:
        self.send(503, b"later")

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    server.daemon_threads = True
    Pages.requests = []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def port() -> Iterator[int]:
    with serving() as number:
        yield number


async def get(url: str, *allowed: str) -> ToolResult:
    return await call(http_get_tool([AllowedHost.parse(host) for host in allowed]), url=url)


async def test_an_allowed_page_comes(port: int) -> None:
    result = await get(f"http://127.0.0.1:{port}/hello", f"127.0.0.1:{port}")
    assert (result.output, result.error) == ("h\u00e9llo", None)
    assert Pages.requests == [("/hello", f"127.0.0.1:{port}")]
    latin = await get(f"http://127.0.0.1:{port}/latin", f"127.0.0.1:{port}")
    assert latin.output == "h\u00e9llo"


@pytest.mark.parametrize(
    ("charset", "body", "text"),
    [
        ("UTF8", "h\u00e9", "h\u00e9"),
        ("us-ascii", "he", "he"),
        ("ISO-8859-1", "h\u00e9", "h\u00e9"),
        ("windows-1251", "\u0434\u0430", "\u0434\u0430"),
        ('"cp1252"', "\u20ac", "\u20ac"),
        ("utf-16", "h\u00e9", "h\u00e9"),
        ("UTF-16LE", "h\u00e9", "h\u00e9"),
    ],
)
async def test_a_page_says_how_it_is_written(port: int, charset: str, body: str, text: str) -> None:
    page = f"{charset}:".encode() + body.encode(charset.strip('"'))
    url = f"http://127.0.0.1:{port}/charset?{quote_from_bytes(page)}"
    assert (await get(url, f"127.0.0.1:{port}")).output == text


@pytest.mark.parametrize("charset", ["punycode", "idna", "hex", "unicode_escape", "none", "../x"])
async def test_a_page_may_not_choose_any_codec(port: int, charset: str) -> None:
    url = f"http://127.0.0.1:{port}/charset?{charset}:a-b%C3%A9%FF%5Cx41"
    assert (await get(url, f"127.0.0.1:{port}")).output == "a-b\u00e9\ufffd\\x41"


async def test_no_codec_takes_long(port: int) -> None:
    began = time.thread_time()
    result = await get(f"http://127.0.0.1:{port}/punycode", f"127.0.0.1:{port}")
    assert time.thread_time() - began < 10
    assert result.output.startswith("aaa")


@pytest.mark.parametrize("host", ["b\u00fccher.example", "XN--bcher-kva.example."])
async def test_an_international_name_is_the_one_in_ascii(
    names: dict[str, list[str]], port: int, host: str
) -> None:
    names["xn--bcher-kva.example"] = ["127.0.0.1"]
    result = await get(f"http://{host}:{port}/hello", f"xn--bcher-kva.example:{port}")
    assert (result.output, result.error) == ("h\u00e9llo", None)


async def test_a_host_is_allowed_by_its_name(port: int) -> None:
    result = await get(f"http://LOCALHOST.:{port}/hello", f"localhost:{port}")
    assert result.output == "h\u00e9llo"


async def test_redirects_stay_with_allowed_hosts(port: int) -> None:
    here = f"127.0.0.1:{port}"
    assert (await get(f"http://{here}/moved", here)).output == "h\u00e9llo"
    refused = await get(f"http://{here}/away", here)
    assert refused.error == f"localhost:{port} is not allowed; allowed are {here}"
    assert "/hello" not in [path for path, _ in Pages.requests[2:]]
    assert (await get(f"http://{here}/away", here, f"localhost:{port}")).output == "h\u00e9llo"
    assert (await get(f"http://{here}/loop", here)).error == "more than 5 redirects"
    assert "must be http://" in str((await get(f"http://{here}/file", here)).error)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://127.0.0.1:{port}/hello", "127.0.0.1:{port} is not allowed"),
        ("http://good.example:{port}/", "good.example:{port} is not allowed"),
        ("http://good.example.evil.example/", "is not allowed"),
        ("http://good.example@127.0.0.1:{port}/", "without a password"),
        ("http://127.1:{port}/", "is not allowed"),
        ("http://[::1]:{port}/", "is not allowed"),
        ("http://2130706433:{port}/", "is not allowed"),
        ("file:///etc/passwd", "must be http://"),
        ("ftp://good.example/", "must be http://"),
        ("unix:///run/docker.sock", "must be http://"),
        ("/hello", "must be http://"),
        ("http:///hello", "must be http://"),
        ("http://good.example:99999/", "is not allowed"),
        ("http://good.example:x/", "it failed"),
        ("", "must be http://"),
    ],
)
async def test_other_urls_are_refused(port: int, url: str, reason: str) -> None:
    result = await get(url.format(port=port), "good.example")
    assert result.output == ""
    assert reason.format(port=port) in str(result.error)
    assert Pages.requests == []


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What names mean: one text for each time that somebody asks, of addresses."""
    addresses: dict[str, list[str]] = {}
    real = socket.getaddrinfo

    def look_up(host: Any, *arguments: Any, **options: Any) -> Any:
        meant = addresses[host].pop(0) if addresses.get(host) else host
        return [found for one in meant.split() for found in real(one, *arguments, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return addresses


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "0.0.0.0", "224.0.0.1", "::1", "fe80::1", "fd00::1", "::ffff:127.0.0.1",  # noqa: S104
        "64:ff9b::7f00:1", "2002:7f00:1::", "64:ff9b:1::7f00:1", "::7f00:1", "::ffff:0:7f00:1",
        "fec0::1",
    ],
)  # fmt: skip
async def test_a_name_that_points_into_a_private_network_is_refused(
    names: dict[str, list[str]], address: str
) -> None:
    names["good.example"] = [address]
    result = await get("http://good.example/", "good.example")
    assert result.error == "good.example is in a private network; it is allowed with its port alone"


async def test_the_address_is_the_one_that_was_looked_at(
    names: dict[str, list[str]], port: int
) -> None:
    """A name that means something else a moment later changes nothing."""
    names["good.example"] = ["127.0.0.1", "203.0.113.7"]
    result = await get(f"http://good.example:{port}/hello", f"good.example:{port}")
    assert result.output == "h\u00e9llo"
    assert Pages.requests == [("/hello", f"good.example:{port}")]


async def test_one_private_address_among_others_is_enough(names: dict[str, list[str]]) -> None:
    names["good.example"] = ["203.0.113.7 10.0.0.1"]
    result = await get("http://good.example/", "good.example")
    assert "private network" in str(result.error)


async def test_the_next_address_is_asked_if_one_cannot_be_reached(
    names: dict[str, list[str]], port: int
) -> None:
    names["good.example"] = ["::1 127.0.0.1"]  # nobody listens at the first one
    result = await get(f"http://good.example:{port}/hello", f"good.example:{port}")
    assert result.output == "h\u00e9llo"


async def test_what_is_no_text_is_refused(port: int) -> None:
    here = f"127.0.0.1:{port}"
    assert (await get(f"http://{here}/image", here)).error == "it is no text but image/png"
    assert "compressed" in str((await get(f"http://{here}/bomb", here)).error)


async def test_an_endless_page_is_cut(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 1000)
    result = await get(f"http://127.0.0.1:{port}/endless", f"127.0.0.1:{port}")
    assert result.output == "x" * 1000 + "\n[only the first 1000 bytes]"


async def test_failures_say_what_happened(port: int) -> None:
    here = f"127.0.0.1:{port}"
    missing = await get(f"http://{here}/none", here)
    assert (missing.error, missing.attempts) == ("HTTP status 404: no such page", 1)
    busy = await get(f"http://{here}/busy", here)
    assert (busy.error, busy.attempts) == ("HTTP status 503: later", 3)


async def test_a_server_that_does_not_answer_costs_bounded_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = f"127.0.0.1:{server.getsockname()[1]}"
        result = await get(f"http://{here}/", here)
    assert (result.error, result.attempts) == ("no answer within 0.1 s", 3)


async def test_a_cancelled_call_closes_its_connection() -> None:
    came, gone = asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.set()
        await reader.read()
        gone.set()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        here = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        task = asyncio.create_task(get(f"http://{here}/", here))
        await came.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await gone.wait()


async def test_proxies_of_the_environment_are_not_used(
    monkeypatch: pytest.MonkeyPatch, port: int
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    result = await get(f"http://127.0.0.1:{port}/hello", f"127.0.0.1:{port}")
    assert result.output == "h\u00e9llo"


def test_hosts_are_read_from_the_command_line() -> None:
    assert AllowedHost.parse("Example.COM") == AllowedHost("example.com")
    assert str(AllowedHost.parse("[::1]:8080")) == "[::1]:8080"
    assert AllowedHost.parse("localhost:80") == AllowedHost("localhost", 80)
    for text in (
        "",
        "*",
        "*.example.com",
        "http://x",
        "x/y",
        "a@b",
        "x:y",
        "x:99999",
        "x:0",
        "x:",
        "::1",
        "x y",
        "x?",
    ):
        with pytest.raises(ValueError, match=r"is no"):
            AllowedHost.parse(text)
