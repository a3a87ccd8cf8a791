"""Work ends when nobody wants its result any more: a client that leaves, a stop string.

The engine runs one request at a time, so a request that comes next shows by its own answer that
the one before has left the engine, and that no component holds the cancellation against another.
"""

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
    chat,
    engine_ended,
    engine_settings,
    eventually,
    http_client,
    lines_about,
    logged,
    nothing_in_flight,
    stream,
)

import httpx
import pytest
import pytest_asyncio

STEP_S = 0.025
LONG_PROMPT = " ".join(["word"] * 4000)  # 50 s of prefill
SOON_S = 15.0  # a busy machine's delay, but not the 50 s for which it would go on


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def narrow(servers: dict[str, str]) -> AsyncIterator[Pipeline]:
    """A pipeline whose slow engine runs one request at a time."""
    engine = engine_settings(
        max_running=1,
        decode_base_ms=STEP_S * 1e3,
        prefill_tokens_per_s=80,
        prefill_chunk=8,
        cache_tokens=8192,
    )
    namespace = f"test-{uuid.uuid4().hex[:12]}"
    options = Options(namespace=namespace, backend="simulated", port=free_port())
    with Children() as children:
        async with pipeline(
            children,
            servers,
            "chapter1",
            options,
            arguments={
                "engine": ["--log-level=debug", *engine],
                "processor": ["--log-level=debug"],
            },
        ) as running:
            await running.wait_ready()
            yield running
            running.kill()


@pytest_asyncio.fixture
async def client(narrow: Pipeline) -> AsyncIterator[httpx.AsyncClient]:
    async with http_client(narrow.url) as client:
        yield client


async def check_serves_at_once(narrow: Pipeline, client: httpx.AsyncClient) -> None:
    """Also waits for the engine's log, so that the next test finds no late lines in it."""
    async with asyncio.timeout(SOON_S):
        answer = await client.post(CHAT, json=chat("hi", max_tokens=2))
    assert answer.status_code == 200, answer.text
    request_id = answer.headers["x-request-id"]
    await eventually(lambda: engine_ended(narrow.processes["engine0"], request_id))


async def wait_for_request(narrow: Pipeline, known: int) -> str:
    """Wait until one more request has reached the engine; its id."""
    engine = narrow.processes["engine0"]
    await eventually(lambda: len(lines_about(engine, "prompt of")) > known)
    return lines_about(engine, "prompt of")[-1].split("[")[1].rstrip("]")


def requests_so_far(narrow: Pipeline) -> int:
    return len(lines_about(narrow.processes["engine0"], "prompt of"))


@pytest.mark.parametrize("stop", [None, ["never in there"]])
async def test_a_client_that_leaves_during_the_stream(
    narrow: Pipeline, client: httpx.AsyncClient, stop: list[str] | None
) -> None:
    """With stop strings the engine's context is one of its own, linked to the client's."""
    async with stream(client, chat(max_tokens=2000, stop=stop)) as answer:
        await answer.read_text(4)
    engine = narrow.processes["engine0"]
    await eventually(lambda: engine_ended(engine, answer.request_id), SOON_S)
    await check_serves_at_once(narrow, client)
    ended = engine_ended(engine, answer.request_id)
    assert ended is not None
    assert ended[0] == "cancelled"
    assert ended[1] < 4 + SOON_S / STEP_S
    await logged(
        narrow.processes["frontend"], f"the client is gone; cancelled [{answer.request_id}]"
    )


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_client_that_leaves_during_prefill(
    narrow: Pipeline, client: httpx.AsyncClient, streamed: bool
) -> None:
    before = requests_so_far(narrow)
    body = chat(LONG_PROMPT, max_tokens=10, stream=streamed)
    asking = asyncio.create_task(client.post(CHAT, json=body))
    request_id = await wait_for_request(narrow, before)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await eventually(lambda: engine_ended(narrow.processes["engine0"], request_id), SOON_S)
    await check_serves_at_once(narrow, client)
    assert engine_ended(narrow.processes["engine0"], request_id) == ("cancelled", 0)


async def test_a_client_that_leaves_before_a_whole_answer(
    narrow: Pipeline, client: httpx.AsyncClient
) -> None:
    """Nothing is sent while a document is being made, so only the closed connection tells."""
    before = requests_so_far(narrow)
    asking = asyncio.create_task(client.post(CHAT, json=chat(max_tokens=2000)))
    request_id = await wait_for_request(narrow, before)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await eventually(lambda: engine_ended(narrow.processes["engine0"], request_id), SOON_S)
    await check_serves_at_once(narrow, client)


async def test_a_client_that_leaves_the_queue(narrow: Pipeline, client: httpx.AsyncClient) -> None:
    """A request that waits for its turn in the engine leaves the queue; the running one goes on."""
    async with stream(client, chat("first", max_tokens=2000)) as running:
        await running.read_text()
        before = requests_so_far(narrow)
        waiting = asyncio.create_task(client.post(CHAT, json=chat("second", max_tokens=2000)))
        request_id = await wait_for_request(narrow, before)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await eventually(lambda: engine_ended(narrow.processes["engine0"], request_id), SOON_S)
        assert engine_ended(narrow.processes["engine0"], request_id) == ("cancelled", 0)
        await running.read_text(len(running.text) + 10)
    await check_serves_at_once(narrow, client)


async def test_many_clients_leave_at_once(narrow: Pipeline, client: httpx.AsyncClient) -> None:
    before = requests_so_far(narrow)
    asking = [
        asyncio.create_task(
            client.post(CHAT, json=chat(f"{n}", max_tokens=2000, stream=n % 2 == 0))
        )
        for n in range(20)
    ]
    await eventually(lambda: requests_so_far(narrow) == before + 20)
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    await check_serves_at_once(narrow, client)
    await nothing_in_flight(client)


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_stop_string_ends_the_engines_work(
    narrow: Pipeline, client: httpx.AsyncClient, streamed: bool
) -> None:
    """A stop string across two tokens ends the answer before it, and the engine within steps."""
    full = await client.post(CHAT, json=chat(max_tokens=30))
    text = full.json()["choices"][0]["message"]["content"]
    middle = len(text) // 2
    stop = text[middle : middle + 7]
    body: dict[str, Any] = chat(max_tokens=2000, stop=["never in there", stop])
    if streamed:
        async with stream(client, body) as answer:
            await answer.read_all()
        got, reason, request_id = answer.text, answer.finish_reason, answer.request_id
    else:
        response = await client.post(CHAT, json=body)
        choice = response.json()["choices"][0]
        got, reason = choice["message"]["content"], choice["finish_reason"]
        request_id = response.headers["x-request-id"]
    assert reason == "stop"
    assert got == text[: text.index(stop)]
    await eventually(lambda: engine_ended(narrow.processes["engine0"], request_id), SOON_S)
    await check_serves_at_once(narrow, client)
    ended = engine_ended(narrow.processes["engine0"], request_id)
    assert ended is not None
    assert ended[1] < 30 + SOON_S / STEP_S
