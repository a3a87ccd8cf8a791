"""The router's queue in a running pipeline, with engines that run one request at a time."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from typing import Any

from launch.chapters import Options
from launch.children import Children
from launch.pipeline import Pipeline, pipeline
from launch.ports import free_port
from tests.chapter1.helpers import (
    CHAT,
    SseStream,
    chat,
    engine_settings,
    eventually,
    http_client,
    stream,
)
from tests.chapter3.conftest import RouterOf

import httpx
import pytest_asyncio

# An answer of 25 tokens takes half a second.
ONE_AT_A_TIME = engine_settings(max_running=1, decode_base_ms=20)
ROUTED = "dynamo_component_router_requests_started_total"
LONG = 4000  # tokens: longer than the test


def nvext(priority: int = 0, **fields: Any) -> dict[str, Any]:
    return {"nvext": {"agent_hints": {"priority": priority}, **fields}}


class Saturated:
    """A pipeline whose engine runs one request, for ever, and has another one waiting."""

    def __init__(self, client: httpx.AsyncClient, metrics: str, long: SseStream) -> None:
        self.client, self._metrics, self._long = client, metrics, long

    async def metric(self, name: str) -> float:
        return await metric(self._metrics, name)

    async def waiting(self, count: int, priority: int = 0) -> None:
        """Wait until so many wait in the router."""
        name = f'dynamo_frontend_router_queue_pending_requests{{priority="{priority}"}}'
        await becomes(self._metrics, name, count)

    async def long_waits(self) -> float:
        """How many have waited for more than 2.5 s and were routed then."""
        name = "dynamo_router_queue_wait_seconds"
        short = await self.metric(f'{name}_bucket{{le="2.5"}}')
        return await self.metric(f"{name}_count") - short

    async def end(self) -> None:
        """The engine has time for others; the next one takes half a second."""
        await self._long.response.aclose()


async def metric(url: str, name: str) -> float:
    async with httpx.AsyncClient(timeout=30, trust_env=False) as client:
        text = (await client.get(url)).text
    values = [line.split()[-1] for line in text.splitlines() if line.startswith(f"{name} ")]
    return float(values[0]) if values else 0.0


async def becomes(url: str, name: str, value: float) -> None:
    async def is_so() -> bool:
        return await metric(url, name) == value

    await eventually(is_so)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def one_engine(servers: dict[str, str]) -> AsyncIterator[tuple[Pipeline, str]]:
    """A pipeline with one engine and a queue of five, and the URL of its router's metrics."""
    lines: list[str] = []
    with Children(lambda name, line: lines.append(f"{name:>10} | {line}")) as children:
        options = Options(
            namespace=f"test-{uuid.uuid4().hex[:12]}",
            engines=1,
            backend="simulated",
            port=free_port(),
        )
        port = free_port()
        router = [f"--metrics-port={port}", "--max-queue=5"]
        arguments = {"engine": ONE_AT_A_TIME, "router": router}
        async with pipeline(children, servers, "chapter3", options, arguments=arguments) as running:
            await running.wait_ready()
            yield running, f"http://127.0.0.1:{port}/metrics"
            running.kill()
    print(*lines[-200:], sep="\n")


@pytest_asyncio.fixture
async def full(one_engine: tuple[Pipeline, str], router_of: RouterOf) -> AsyncIterator[Saturated]:
    running, url = one_engine
    await router_of(running).wait_ready(1)
    async with http_client(running.url) as client:
        before = await metric(url, ROUTED)
        async with stream(client, chat("long", max_tokens=LONG)) as long:
            await long.read_text()
            second = asyncio.create_task(client.post(CHAT, json=chat("second", max_tokens=25)))
            await becomes(url, ROUTED, before + 2)
            yield Saturated(client, url, long)
        assert (await second).status_code == 200


async def test_a_higher_priority_overtakes(full: Saturated) -> None:
    order: list[str] = []

    async def one(name: str, **fields: Any) -> None:
        headers = fields.pop("headers", None)
        body = chat(name, max_tokens=2, **fields)
        response = await full.client.post(CHAT, json=body, headers=headers)
        assert response.status_code == 200, response.text
        order.append(name)

    async with asyncio.TaskGroup() as tasks:
        for number in range(3):
            tasks.create_task(one(f"bulk {number}", **nvext(-1)))
        await full.waiting(3, -1)
        tasks.create_task(one("normal"))
        tasks.create_task(one("urgent", headers={"x-dynamo-request-priority": "9"}))
        await full.waiting(1, 9)
        await full.waiting(1)
        await full.end()
    assert order[:2] == ["urgent", "normal"]
    assert len(order) == 5


async def test_a_full_queue_answers_429_with_retry_after(full: Saturated) -> None:
    refusals = 'dynamo_router_requests_refused_total{reason="queue_full"}'
    before = await full.metric(refusals)
    async with asyncio.TaskGroup() as tasks:
        waiting = [
            tasks.create_task(full.client.post(CHAT, json=chat(f"{number}", max_tokens=2)))
            for number in range(5)
        ]
        await full.waiting(5)
        for refused in (
            await full.client.post(CHAT, json=chat("too many")),
            await full.client.post(CHAT, json=chat("too many", stream=True)),
        ):
            assert refused.status_code == 429
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            error = refused.json()["error"]
            assert error["code"] == "overloaded"
            assert "5 requests wait, which is as many as may" in error["message"]
        assert await full.metric(refusals) == before + 2
        urgent = tasks.create_task(
            full.client.post(CHAT, json=chat("urgent", max_tokens=2, **nvext(1)))
        )
        await full.waiting(1, 1)
        await full.end()
    assert urgent.result().status_code == 200
    displaced = [task.result() for task in waiting if task.result().status_code != 200]
    assert [response.status_code for response in displaced] == [429]
    assert "higher priority" in displaced[0].json()["error"]["message"]


async def test_deadlines_that_cannot_be_met_are_refused(full: Saturated) -> None:
    """One at once, because it cannot be met even by an idle engine; one while it waits."""
    hopeless = await full.client.post(CHAT, json=chat("Hi", **nvext(deadline_ms=0.01)))
    assert hopeless.status_code == 429
    assert "The first token cannot come within 0.01 ms" in hopeless.json()["error"]["message"]
    headers = {"x-dynamo-deadline-ms": "700"}
    late = await full.client.post(CHAT, json=chat("Hi"), headers=headers)
    assert late.status_code == 429
    assert "cannot come within 700 ms" in late.json()["error"]["message"]
    assert int(late.headers["retry-after"]) >= 1


async def test_who_waits_for_longer_than_a_router_may_be_silent_is_served(full: Saturated) -> None:
    """A processor gives up a router that says nothing for 3 s; one that leaves is forgotten."""
    before = await full.long_waits()
    patient = asyncio.create_task(full.client.post(CHAT, json=chat("patient", max_tokens=2)))
    leaves = asyncio.create_task(full.client.post(CHAT, json=chat("leaves", max_tokens=2)))
    await full.waiting(2)
    leaves.cancel()
    await full.waiting(1)
    await asyncio.sleep(4)  # longer than ROUTER_ANSWER_S: the time is what is tested
    assert not patient.done()
    await full.end()
    assert (await patient).status_code == 200
    assert await full.long_waits() == before + 1


async def test_wrong_hints_are_refused_by_name(full: Saturated) -> None:
    wrong = await full.client.post(CHAT, json=chat(**nvext(1000)))
    assert wrong.status_code == 400
    assert wrong.json()["error"]["param"] == "nvext.agent_hints.priority"
    wrong = await full.client.post(CHAT, json=chat(), headers={"x-dynamo-deadline-ms": "soon"})
    assert wrong.status_code == 400
    assert wrong.json()["error"]["param"] == "x-dynamo-deadline-ms"
