"""The frontend as a process: what its listening socket and its open connections make of its end."""

import contextlib
import socket
from urllib.parse import urlsplit

from tests.chapter1.helpers import CHAT, eventually, lines_about
from tests.conftest import StartPipeline

import httpx
import pytest


@pytest.mark.parametrize("body", ["{", ""], ids=["half a body", "no body"])
async def test_an_upload_that_stalls_does_not_hold_up_the_end(
    start_pipeline: StartPipeline, body: str
) -> None:
    """The drain gives up on it after its limit: status 0, the drain's own warning, no traceback."""
    async with start_pipeline(arguments={"frontend": ["--drain-timeout=1"]}) as running:
        frontend = running.processes["frontend"]
        address = urlsplit(running.url)
        with socket.create_connection((address.hostname, address.port), timeout=5) as connection:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{body}"
            connection.sendall(head.encode())
            await eventually(lambda: in_flight(running.url))
            frontend.terminate()
            assert await frontend.wait(30) == 0
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1000) == b""
        assert lines_about(frontend, "drain took longer")
        assert lines_about(frontend, "left before the whole request")
        assert not lines_about(frontend, "Traceback")
        assert not lines_about(frontend, "before it was ready")


def in_flight(url: str) -> bool:
    metrics = httpx.get(f"{url}/metrics", timeout=30, trust_env=False).text
    return "dynamo_frontend_inflight_requests 1.0" in metrics


async def test_an_address_that_is_taken(start_pipeline: StartPipeline) -> None:
    async with start_pipeline(start=[], wait=False) as running:
        address = urlsplit(running.url)
        with socket.create_server((str(address.hostname), address.port or 0)):
            frontend = running.start("frontend")
            assert await frontend.wait(20) == 1
        assert lines_about(frontend, f"cannot listen on 127.0.0.1:{address.port}: ")
        assert not lines_about(frontend, "Traceback")
