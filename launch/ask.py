"""One question to a running pipeline, its answer as it arrives, and what it took."""

import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from launch.errors import LaunchError

import httpx

# The first token may have to wait for a long prompt; connecting to this machine may not.
TIMEOUT = httpx.Timeout(300.0, connect=5.0)
# A small model may go on until its context is full.
MAX_ANSWER_TOKENS = 256


@dataclass(frozen=True)
class AnswerStats:
    """What one answer took; `tokens_per_s` is the rate after the first token."""

    ttft_ms: float
    tokens_per_s: float
    prompt_tokens: int
    completion_tokens: int
    worker_id: int | None

    def __str__(self) -> str:
        worker = "unknown" if self.worker_id is None else self.worker_id
        return (
            f"TTFT {self.ttft_ms:.0f} ms · {self.tokens_per_s:.1f} tokens/s · "
            f"{self.prompt_tokens} prompt + {self.completion_tokens} completion tokens · "
            f"worker {worker}"
        )


async def ask(url: str, question: str, on_text: Callable[[str], None]) -> AnswerStats:
    """Ask the pipeline at `url` one question, greedily; `on_text` gets the answer in pieces.

    Raises:
        LaunchError: the pipeline refused the request or failed while it answered.
    """
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT, trust_env=False) as client:
        try:
            return await _stream_answer(client, question, on_text)
        except httpx.HTTPError as error:
            raise LaunchError(
                f"the request to {url} failed: {type(error).__name__}: {error}"
            ) from error


async def _stream_answer(
    client: httpx.AsyncClient, question: str, on_text: Callable[[str], None]
) -> AnswerStats:
    request = {
        "model": await served_model(client),
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": MAX_ANSWER_TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
        "nvext": {"extra_fields": ["worker_id", "timing"]},
    }
    usage: dict[str, int] | None = None
    worker_id: int | None = None
    sent = time.perf_counter()
    first = last = None
    async with client.stream("POST", "/v1/chat/completions", json=request) as response:
        await check(response)
        async for event in events_of(response):
            if "error" in event:
                raise LaunchError(f"the answer broke off: {_error_text(event)}")
            for choice in event.get("choices", ()):
                text = choice["delta"].get("content")
                if text:
                    last = time.perf_counter()
                    first = first or last
                    on_text(text)
            usage = event.get("usage") or usage
            worker_id = (event.get("nvext") or {}).get("worker_id", worker_id)
    if usage is None:
        raise LaunchError("the answer ended without its usage")
    ended = time.perf_counter()
    first, last = first or ended, last or ended
    tokens = usage["completion_tokens"]
    return AnswerStats(
        ttft_ms=(first - sent) * 1000,
        tokens_per_s=(tokens - 1) / (last - first) if last > first else tokens / (ended - sent),
        prompt_tokens=usage["prompt_tokens"],
        completion_tokens=tokens,
        worker_id=worker_id,
    )


async def served_model(client: httpx.AsyncClient) -> str:
    """The id of the model that the pipeline serves."""
    response = await client.get("/v1/models")
    await check(response)
    model: str = response.json()["data"][0]["id"]
    return model


async def check(response: httpx.Response) -> None:
    """Raise a `LaunchError` that says what the pipeline has refused."""
    if response.is_success:
        return
    body = await response.aread()
    try:
        text = _error_text(json.loads(body))
    except ValueError:
        text = body.decode(errors="replace")
    raise LaunchError(f"the pipeline answered {response.status_code}: {text}")


def _error_text(body: dict[str, Any]) -> str:
    error = body.get("error", body)
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


async def events_of(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The data of server-sent events."""
    async for line in response.aiter_lines():
        data = line.removeprefix("data: ")
        if data != line and data != "[DONE]":
            yield json.loads(data)
