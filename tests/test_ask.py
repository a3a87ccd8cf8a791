"""The launcher's question: the request it sends, and every way in which the answer can end."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from launch.ask import MAX_ANSWER_TOKENS, AnswerStats, ask
from launch.errors import LaunchError
from launch.ports import LOOPBACK, free_port

import pytest

MODELS = {"object": "list", "data": [{"id": "toy"}]}


def delta(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}


FINAL = {
    "choices": [],
    "usage": {"prompt_tokens": 5, "completion_tokens": 2},
    "nvext": {"worker_id": 7},
}


@contextmanager
def server(answer: Callable[[dict[str, Any]], tuple[int, bytes]]) -> Iterator[str]:
    """An HTTP server that knows a model and answers every question alike; its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(200, json.dumps(MODELS).encode())

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.reply(*answer(json.loads(body)))

        def reply(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content)

    with ThreadingHTTPServer((LOOPBACK, 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        try:
            yield f"http://{LOOPBACK}:{listening.server_port}"
        finally:
            listening.shutdown()
            thread.join()


def events(*items: dict[str, Any], end: str = "data: [DONE]\n\n") -> bytes:
    return ("".join(f"data: {json.dumps(item)}\n\n" for item in items) + end).encode()


async def test_streams_the_answer_and_tells_what_it_took() -> None:
    sent = []

    def answer(request: dict[str, Any]) -> tuple[int, bytes]:
        sent.append(request)
        return 200, events(delta("Pa"), delta("ris"), FINAL)

    pieces: list[str] = []
    with server(answer) as url:
        stats = await ask(url, "Where?", pieces.append)
    assert pieces == ["Pa", "ris"]
    assert (stats.prompt_tokens, stats.completion_tokens, stats.worker_id) == (5, 2, 7)
    assert stats.ttft_ms > 0
    assert stats.tokens_per_s > 0
    assert sent == [
        {
            "model": "toy",
            "messages": [{"role": "user", "content": "Where?"}],
            "temperature": 0,
            "max_tokens": MAX_ANSWER_TOKENS,
            "stream": True,
            "stream_options": {"include_usage": True},
            "nvext": {"extra_fields": ["worker_id", "timing"]},
        }
    ]


@pytest.mark.parametrize(
    ("status", "content", "message"),
    [
        (429, b'{"error": {"message": "too busy", "type": "x"}}', "answered 429: too busy"),
        (500, b"oops", "answered 500: oops"),
        (
            200,
            events(delta("Pa"), {"error": {"message": "engine died"}}),
            "the answer broke off: engine died",
        ),
        (200, events(delta("Pa"), end=""), "ended without its usage"),
    ],
)
async def test_an_answer_that_fails(status: int, content: bytes, message: str) -> None:
    with (
        server(lambda request: (status, content)) as url,
        pytest.raises(LaunchError, match=message),
    ):
        await ask(url, "Where?", lambda text: None)


async def test_nobody_there() -> None:
    with pytest.raises(LaunchError, match="ConnectError"):
        await ask(f"http://{LOOPBACK}:{free_port()}", "Where?", lambda text: None)


def test_the_line_of_figures() -> None:
    assert str(AnswerStats(41.4, 103.21, 38, 8, 0)) == (
        "TTFT 41 ms · 103.2 tokens/s · 38 prompt + 8 completion tokens · worker 0"
    )
