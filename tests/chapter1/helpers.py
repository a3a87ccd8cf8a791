"""What the tests of the chat pipeline share: requests, streams as they arrive, conditions."""

import asyncio
import inspect
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from launch.child import Child

import httpx

MODEL = "SmolLM2-135M-Instruct"
CHAT = "/v1/chat/completions"
POLL_S = 0.02


async def eventually(condition: Callable[[], object], timeout: float = 15.0) -> float:
    """Wait until `condition()`, awaited if it is a coroutine, is true; the seconds it took."""
    began = time.monotonic()
    while True:
        result = condition()
        if inspect.isawaitable(result):
            result = await result
        elapsed = time.monotonic() - began
        if result:
            return elapsed
        source = inspect.getsource(condition).strip()
        assert elapsed < timeout, f"not true after {timeout:.0f} s: {source}"
        await asyncio.sleep(POLL_S)


def http_client(url: str, timeout: float = 30.0) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=timeout, trust_env=False)


def chat(text: str = "Tell me a story.", **fields: Any) -> dict[str, Any]:
    """The body of a chat request."""
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **fields}


class SseStream:
    """An SSE answer as it arrives; `received` has the data of the events read so far."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.received: list[str] = []
        self._events = self._read()

    @property
    def request_id(self) -> str:
        return self.response.headers["x-request-id"]

    @property
    def chunks(self) -> list[dict[str, Any]]:
        return [json.loads(data) for data in self.received if data != "[DONE]"]

    @property
    def text(self) -> str:
        choices = [chunk["choices"][0] for chunk in self.chunks if chunk.get("choices")]
        return "".join(
            choice["delta"].get("content") or "" if "delta" in choice else choice["text"]
            for choice in choices
        )

    @property
    def finish_reason(self) -> str | None:
        reasons = [c["choices"][0]["finish_reason"] for c in self.chunks if c.get("choices")]
        return reasons[-1] if reasons else None

    @property
    def error(self) -> dict[str, Any] | None:
        """The error event that ended the stream, if one did."""
        return self.chunks[-1].get("error") if self.chunks else None

    async def read_text(self, characters: int = 1) -> None:
        """Read until so much text has come."""
        while len(self.text) < characters:
            await anext(self._events)

    async def read_all(self) -> None:
        async for _ in self._events:
            pass

    async def _read(self) -> AsyncIterator[str]:
        async for line in self.response.aiter_lines():
            if line:
                assert line.startswith("data: "), line
                self.received.append(line.removeprefix("data: "))
                yield self.received[-1]


@asynccontextmanager
async def stream(
    client: httpx.AsyncClient, body: dict[str, Any], path: str = CHAT
) -> AsyncIterator[SseStream]:
    """A streamed answer with status 200; leaving the block early closes the connection."""
    async with client.stream("POST", path, json={**body, "stream": True}) as response:
        if response.status_code != 200:
            await response.aread()
        assert response.status_code == 200, response.text
        yield SseStream(response)


def lines_about(child: Child, text: str) -> list[str]:
    """The component's log lines that have `text`, a request id for example."""
    return [line for line in list(child.log) if text in line]


def engine_ended(child: Child, request_id: str) -> tuple[str, int] | None:
    """How the engine's work for a request ended, and after how many tokens; None if it has not."""
    for line in lines_about(child, request_id):
        if match := re.search(r"ended: (\w+) after (\d+) tokens", line):
            return match[1], int(match[2])
    return None


async def is_healthy(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/health")).status_code == 200
    except httpx.HTTPError:
        return False


Request = Callable[[], Awaitable[httpx.Response]]
