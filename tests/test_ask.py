"""The launcher's question: the request it sends, and every way in which the answer can end."""

import json
from types import SimpleNamespace
from typing import Any

from launch.ask import MAX_ANSWER_TOKENS, AnswerStats, ask
from launch.errors import LaunchError
from launch.ports import LOOPBACK, free_port
from tests.answering_server import server

import pytest


def delta(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}


FINAL = {
    "choices": [],
    "usage": {"prompt_tokens": 5, "completion_tokens": 2},
    "nvext": {"worker_id": 7},
}


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
    ("arrivals", "tokens", "ttft_ms", "tokens_per_s"),
    [
        # The rate is that of the tokens after the first one.
        ([0.5, 0.6, 0.7], 21, 500, 20 / 0.2),
        # All in one piece: the whole time is all there is.
        ([0.5], 4, 500, 4 / 0.8),
        ([], 0, 800, 0),
    ],
)
async def test_ttft_and_rate(
    monkeypatch: pytest.MonkeyPatch,
    arrivals: list[float],
    tokens: int,
    ttft_ms: float,
    tokens_per_s: float,
) -> None:
    clock = iter([0.0, *arrivals, 0.8])
    monkeypatch.setattr("launch.ask.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    final = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": tokens}}
    answer = events(*(delta("x") for _ in arrivals), final)
    with server(lambda request: (200, answer)) as url:
        stats = await ask(url, "Where?", lambda text: None)
    assert stats.ttft_ms == pytest.approx(ttft_ms)
    assert stats.tokens_per_s == pytest.approx(tokens_per_s)
    assert stats.worker_id is None


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
