"""The router's queue in a running pipeline, with engines that run one request at a time."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from launch.pipeline import Pipeline
from tests.chapter1.helpers import (
    CHAT,
    SseStream,
    chat,
    engine_settings,
    eventually,
    http_client,
    lines_about,
    stream,
)
from tests.chapter3.conftest import RouterOf
from tests.conftest import StartPipeline

import httpx

# An answer of 25 tokens takes half a second.
ONE_AT_A_TIME = engine_settings(max_running=1, decode_base_ms=20)
LONG = 4000  # tokens: longer than the test


def nvext(priority: int = 0, **fields: Any) -> dict[str, Any]:
    return {"nvext": {"agent_hints": {"priority": priority}, **fields}}


async def metrics_url(running: Pipeline) -> str:
    await eventually(lambda: lines_about(running.processes["router"], "metrics on "))
    line = lines_about(running.processes["router"], "metrics on ")[0]
    found = re.search(r"metrics on (\S+)", line)
    assert found is not None
    return found[1]


class Saturated:
    """A pipeline with one engine that runs one request, for ever, and has another one waiting."""

    def __init__(self, client: httpx.AsyncClient, url: str) -> None:
        self.client, self.url = client, url

    async def metric(self, name: str) -> float:
        async with httpx.AsyncClient(trust_env=False) as client:
            text = (await client.get(self.url)).text
        values = [line.split()[-1] for line in text.splitlines() if line.startswith(f"{name} ")]
        return float(values[0]) if values else 0.0

    async def waiting(self, priority: int = 0) -> float:
        name = "dynamo_frontend_router_queue_pending_requests"
        return await self.metric(f'{name}{{priority="{priority}"}}')


@asynccontextmanager
async def saturated(
    start_pipeline: StartPipeline, router_of: RouterOf, *router: str
) -> AsyncIterator[tuple[Saturated, SseStream]]:
    """With the answer that the engine is busy with; the next one after it takes half a second."""
    arguments = {"engine": ONE_AT_A_TIME, "router": ["--metrics-port=0", *router]}
    async with (
        start_pipeline(chapter="chapter3", engines=1, arguments=arguments) as running,
        http_client(running.url) as client,
    ):
        await router_of(running).wait_ready(1)
        full = Saturated(client, await metrics_url(running))
        async with stream(client, chat("long", max_tokens=LONG)) as long:
            await long.read_text()
            second = asyncio.create_task(client.post(CHAT, json=chat("second", max_tokens=25)))
            routed = "dynamo_component_router_requests_started_total"
            await eventually(lambda: _is(full.metric(routed), 2))
            yield full, long
            await long.response.aclose()
        assert (await second).status_code == 200


async def _is(value: Any, wanted: float) -> bool:
    return bool(await value == wanted)


async def test_a_higher_priority_overtakes(
    start_pipeline: StartPipeline, router_of: RouterOf
) -> None:
    async with saturated(start_pipeline, router_of) as (full, long):
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
            await eventually(lambda: _is(full.waiting(-1), 3))
            tasks.create_task(one("normal"))
            tasks.create_task(one("urgent", headers={"x-dynamo-request-priority": "9"}))
            await eventually(lambda: _is(full.waiting(9), 1))
            await eventually(lambda: _is(full.waiting(0), 1))
            await long.response.aclose()
        assert order[:2] == ["urgent", "normal"]
        assert len(order) == 5


async def test_a_full_queue_answers_429_with_retry_after(
    start_pipeline: StartPipeline, router_of: RouterOf
) -> None:
    async with saturated(start_pipeline, router_of, "--max-queue=1") as (full, _):
        waits = asyncio.create_task(full.client.post(CHAT, json=chat("waits", max_tokens=2)))
        await eventually(lambda: _is(full.waiting(), 1))
        for refused in (
            await full.client.post(CHAT, json=chat("too many")),
            await full.client.post(CHAT, json=chat("too many", stream=True)),
        ):
            assert refused.status_code == 429
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            error = refused.json()["error"]
            assert error["code"] == "overloaded"
            assert "1 requests wait, which is as many as may" in error["message"]
        assert await full.metric('dynamo_router_requests_refused_total{reason="queue_full"}') == 2
        urgent = asyncio.create_task(
            full.client.post(CHAT, json=chat("urgent", max_tokens=2, **nvext(1)))
        )
        displaced = await waits
        assert displaced.status_code == 429
        assert "higher priority" in displaced.json()["error"]["message"]
        urgent.cancel()
        await asyncio.gather(urgent, return_exceptions=True)


async def test_deadlines_that_cannot_be_met_are_refused(
    start_pipeline: StartPipeline, router_of: RouterOf
) -> None:
    """One at once, because it cannot be met even by an idle engine; one while it waits."""
    async with saturated(start_pipeline, router_of) as (full, _):
        hopeless = await full.client.post(CHAT, json=chat("Hi", **nvext(deadline_ms=0.01)))
        assert hopeless.status_code == 429
        assert "The first token cannot come within 0.01 ms" in hopeless.json()["error"]["message"]
        headers = {"x-dynamo-deadline-ms": "700"}
        late = await full.client.post(CHAT, json=chat("Hi"), headers=headers)
        assert late.status_code == 429
        assert "cannot come within 700 ms" in late.json()["error"]["message"]
        assert int(late.headers["retry-after"]) >= 1


async def test_who_waits_for_longer_than_a_router_may_be_silent_is_served(
    start_pipeline: StartPipeline, router_of: RouterOf
) -> None:
    """A processor gives up a router that says nothing for 3 s; one that leaves is forgotten."""
    async with saturated(start_pipeline, router_of) as (full, long):
        patient = asyncio.create_task(full.client.post(CHAT, json=chat("patient", max_tokens=2)))
        leaves = asyncio.create_task(full.client.post(CHAT, json=chat("leaves", max_tokens=2)))
        await eventually(lambda: _is(full.waiting(), 2))
        leaves.cancel()
        await eventually(lambda: _is(full.waiting(), 1))
        await asyncio.sleep(4)  # longer than ROUTER_ANSWER_S: the time is what is tested
        assert not patient.done()
        await long.response.aclose()
        assert (await patient).status_code == 200
        waited = 'dynamo_router_queue_wait_seconds_bucket{le="2.5"}'
        total = "dynamo_router_queue_wait_seconds_count"
        assert await full.metric(total) == await full.metric(waited) + 1


async def test_wrong_hints_are_refused_by_name(api: httpx.AsyncClient) -> None:
    wrong = await api.post(CHAT, json=chat(**nvext(1000)))
    assert wrong.status_code == 400
    assert wrong.json()["error"]["param"] == "nvext.agent_hints.priority"
    wrong = await api.post(CHAT, json=chat(), headers={"x-dynamo-deadline-ms": "soon"})
    assert wrong.status_code == 400
    assert wrong.json()["error"]["param"] == "x-dynamo-deadline-ms"
