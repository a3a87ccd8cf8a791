"""What the tests of the chat pipeline share: requests, streams as they arrive, conditions."""

import asyncio
import base64
import inspect
import json
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from launch.child import Child
from launch.pipeline import Pipeline

import httpx

MODEL = "SmolLM2-135M-Instruct"
CHAT = "/v1/chat/completions"
POLL_S = 0.02


async def eventually(condition: Callable[[], object], timeout: float = 30.0) -> float:
    """Wait until `condition()`, awaited if it is a coroutine, is true; the seconds it took."""
    began = time.monotonic()
    while True:
        result = condition()
        if inspect.isawaitable(result):
            result = await result
        elapsed = time.monotonic() - began
        if result:
            return elapsed
        if elapsed >= timeout:
            source = inspect.getsource(condition).strip()
            raise AssertionError(f"not true after {timeout:.0f} s: {source}")
        await asyncio.sleep(POLL_S)


def http_client(url: str, timeout: float = 30.0) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=timeout, trust_env=False)


def engine_settings(**settings: object) -> list[str]:
    """The engine's arguments for these settings of its backend."""
    return [f"--engine-arg={name}={value}" for name, value in settings.items()]


def chat(text: str = "Tell me a story.", **fields: Any) -> dict[str, Any]:
    """The body of a chat request."""
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **fields}


def start_with_lease(running: Pipeline, name: str, seconds: float) -> Child:
    """Start a process that stays listed for so long after its death, instead of 10 s."""
    environment = {**running.environment, "ETCD_LEASE_TTL": f"{seconds:g}"}
    child = running.children.start(name, running.commands[name], environment)
    running.processes[name] = child
    return child


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
        assert response.status_code == 200, f"{response.status_code}: {response.text}"
        yield SseStream(response)


def lines_about(child: Child, text: str) -> list[str]:
    """The component's log lines that have `text`, a request id for example."""
    return [line for line in list(child.log) if text in line]


async def logged(child: Child, text: str, times: int = 1) -> None:
    """Wait until the component has logged so many lines with `text`.

    Its lines come to the test on their own way, later perhaps than an answer that it gave after.
    """
    await eventually(lambda: len(lines_about(child, text)) == times)


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


async def nothing_in_flight(client: httpx.AsyncClient) -> None:
    """Wait until the frontend has counted the end of all its requests."""

    async def is_idle() -> bool:
        return "dynamo_frontend_inflight_requests 0.0" in (await client.get("/metrics")).text

    await eventually(is_idle)


class Load:
    """Clients that ask one short question after another; `failures` has what went wrong."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client
        self.answered = 0
        self.failures: list[str] = []
        self.stopping = False

    async def ask_for_ever(self, name: str) -> None:
        number = 0
        while not self.stopping:
            number += 1
            body = chat(f"{name}, {number}", max_tokens=5)
            try:
                async with stream(self.client, body) as answer:
                    await answer.read_all()
                assert answer.finish_reason == "length", f"stream ended: {answer.received[-1]}"
            except (httpx.HTTPError, AssertionError) as error:
                self.failures.append(f"{name} {number}: {type(error).__name__} {error}")
                await asyncio.sleep(POLL_S)
            else:
                self.answered += 1

    async def answers(self, count: int) -> None:
        """Wait for so many more answers."""
        goal = self.answered + count
        await eventually(lambda: self.answered >= goal)


@asynccontextmanager
async def load(client: httpx.AsyncClient, clients: int = 4) -> AsyncIterator[Load]:
    """Load on the pipeline for the length of the block; the last questions are answered in it."""
    running = Load(client)
    async with asyncio.TaskGroup() as tasks:
        for number in range(clients):
            tasks.create_task(running.ask_for_ever(f"client {number}"))
        try:
            yield running
        finally:
            running.stopping = True


async def end_lease(running: Pipeline, instance: int) -> None:
    """Have etcd forget a dead instance now, as it does when the lease of that name has ended."""
    async with httpx.AsyncClient(timeout=30, trust_env=False) as client:
        answer = await client.post(
            f"{running.environment['ETCD_ENDPOINTS']}/v3/lease/revoke", json={"ID": str(instance)}
        )
        answer.raise_for_status()


async def registered(running: Pipeline) -> list[str]:
    """The instances of the pipeline that etcd lists, as `component/endpoint`."""
    prefix = f"v1/instances/{running.namespace}/"
    after = prefix[:-1] + chr(ord("/") + 1)
    encoded = [base64.b64encode(key.encode()).decode() for key in (prefix, after)]
    async with httpx.AsyncClient(timeout=30, trust_env=False) as client:
        answer = await client.post(
            f"{running.environment['ETCD_ENDPOINTS']}/v3/kv/range",
            json={"key": encoded[0], "range_end": encoded[1], "keys_only": True},
        )
    keys = [base64.b64decode(pair["key"]).decode() for pair in answer.json().get("kvs", [])]
    return sorted("/".join(key.removeprefix(prefix).split("/")[:2]) for key in keys)
