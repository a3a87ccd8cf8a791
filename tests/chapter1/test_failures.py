"""Components and servers die under load: who notices, how soon, and what goes on working."""

import asyncio
import itertools
import sys
from contextlib import AsyncExitStack
from typing import Any

from launch.child import Child
from launch.children import Children
from launch.servers import etcd_server, nats_server, server_environment
from tests.chapter1.helpers import (
    CHAT,
    chat,
    engine_ended,
    engine_settings,
    eventually,
    http_client,
    is_healthy,
    lines_about,
    load,
    logged,
    registered,
    stream,
)
from tests.conftest import StartPipeline

import httpx
import psutil
import pytest

LONG_LEASE = {"ETCD_LEASE_TTL": "60"}  # what is killed is listed until a busy test has looked
STEPS_OF_20_MS = ["--log-level=debug", *engine_settings(decode_base_ms=20)]


async def failed(answers: list[Any]) -> None:
    """Every stream ends with an error event, and nothing after it."""
    for answer in answers:
        await answer.read_all()
        assert answer.error is not None, answer.received[-1]
        assert (answer.error["type"], answer.error["code"]) == ("server_error", "unavailable")


async def statuses_until_served(client: httpx.AsyncClient, timeout: float = 30) -> list[int]:
    """Ask until an answer comes; the statuses on the way."""
    statuses: list[int] = []

    async def served() -> bool:
        response = await client.post(CHAT, json=chat(max_tokens=1))
        statuses.append(response.status_code)
        return response.status_code == 200

    await eventually(served, timeout)
    return statuses


@pytest.mark.parametrize("name", ["engine0", "processor"])
async def test_kill_9_and_restart(
    start_pipeline: StartPipeline, servers: dict[str, str], name: str
) -> None:
    """Streams get an error at once, and a restart of the dead one is all that is needed.

    The dead instance stays listed for the rest of its lease; that must not fail a request.
    """
    arguments, environment = {"engine": STEPS_OF_20_MS}, {**servers, **LONG_LEASE}
    async with (
        start_pipeline(arguments=arguments, environment=environment) as running,
        http_client(running.url) as client,
    ):
        async with AsyncExitStack() as stack:
            answers = [
                await stack.enter_async_context(stream(client, chat(f"{n}", max_tokens=4000)))
                for n in range(3)
            ]
            for answer in answers:
                await answer.read_text()
            whole = asyncio.create_task(client.post(CHAT, json=chat("whole", max_tokens=4000)))
            engine = running.processes["engine0"]
            await eventually(lambda: len(lines_about(engine, "prompt of")) == 4)
            running.processes[name].kill()
            await failed(answers)
            response = await whole
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "unavailable"
        listed = {entry.partition("/")[0] for entry in await registered(running)}
        assert listed == {"engine", "processor", "frontend"}, "nobody waited for a lease to end"
        health = await client.get("/health")
        assert health.status_code == 503
        assert "unavailable" in health.json()["reason"]
        if name == "processor":
            for answer in answers:
                await eventually(lambda: engine_ended(engine, answer.request_id))  # noqa: B023

        await running.processes[name].wait()
        running.start(name)
        statuses = await statuses_until_served(client)
        assert set(statuses[:-1]) <= {503}
        await eventually(lambda: is_healthy(client))
        assert [
            (await client.post(CHAT, json=chat(f"{n}", max_tokens=1))).status_code
            for n in range(20)
        ] == [200] * 20


async def test_kill_9_of_the_frontend_ends_its_work(start_pipeline: StartPipeline) -> None:
    """Nobody can read the answers any more, so the engine must not go on."""
    arguments = {"engine": STEPS_OF_20_MS}
    async with start_pipeline(arguments=arguments) as running, http_client(running.url) as client:
        async with stream(client, chat(max_tokens=4000)) as answer:
            await answer.read_text()
            running.processes["frontend"].kill()
            with pytest.raises(httpx.HTTPError):
                await answer.read_all()
        engine = running.processes["engine0"]
        await eventually(lambda: engine_ended(engine, answer.request_id))
        await running.processes["frontend"].wait()
        running.start("frontend")
        await running.wait_ready()
    async with http_client(running.url) as client:
        with pytest.raises(httpx.ConnectError):
            await client.get("/live")


async def test_one_of_two_engines_dies(start_pipeline: StartPipeline) -> None:
    """Only the streams that it had begun fail; what it had not answered yet, the other answers."""
    async with (
        start_pipeline(engines=2, start=[]) as running,
        http_client(running.url) as client,
    ):
        # However long it takes to kill it, it has not answered by then.
        for_ever = engine_settings(prefill_tokens_per_s=1, prefill_chunk=64)
        running.commands["engine0"] += ["--log-level=debug", *for_ever]
        running.commands["engine1"] += ["--log-level=debug"]
        for name in running.commands:
            running.start(name)
        await running.wait_ready()
        dying, other = running.processes["engine0"], running.processes["engine1"]
        asked: list[asyncio.Task[httpx.Response]] = []

        def begun(*engines: Child) -> int:
            return sum(len(lines_about(engine, "prompt of")) for engine in engines)

        while begun(dying) < 2:
            body = chat(" ".join([f"{len(asked)}"] * 150), max_tokens=3)
            asked.append(asyncio.create_task(client.post(CHAT, json=body)))
            await eventually(lambda: begun(dying, other) == len(asked))
        dying.kill()
        assert [(await request).status_code for request in asked] == [200] * len(asked)
        await logged(running.processes["processor"], "trying another", 2)
        answers = await asyncio.gather(
            *[client.post(CHAT, json=chat(f"{n}", max_tokens=1)) for n in range(20)]
        )
        assert [answer.status_code for answer in answers] == [200] * 20


async def test_one_of_two_processors_dies(
    start_pipeline: StartPipeline, children: Children
) -> None:
    arguments = {"engine": STEPS_OF_20_MS}
    async with start_pipeline(arguments=arguments) as running, http_client(running.url) as client:
        command = running.commands["processor"]
        second = children.start("processor2", command, running.environment)
        await second.wait_ready()
        async with load(client) as work:
            await work.answers(10)
            second.kill()
            await work.answers(40)
        # Each client may have had one stream under way in the one that died.
        assert len(work.failures) <= 4, work.failures
        assert all("stream ended: " in failure for failure in work.failures), work.failures


async def test_a_frontend_with_nothing_behind_it(start_pipeline: StartPipeline) -> None:
    """It says why it cannot serve, and serves as soon as the others are there."""
    async with (
        start_pipeline(start=["frontend"], wait=False) as running,
        http_client(running.url) as client,
    ):

        async def answers() -> bool:
            try:
                return (await client.get("/live")).status_code == 200
            except httpx.ConnectError:
                return False

        await eventually(answers)
        health = await client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "unavailable")
        assert "processor" in health.json()["reason"]
        for response in (
            await client.post(CHAT, json=chat()),
            await client.post(CHAT, json=chat(stream=True)),
            await client.get("/v1/models"),
        ):
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "unavailable"
        assert not running.processes["frontend"].ready.done()

        running.start("processor")
        await running.processes["processor"].wait_ready()
        await eventually(lambda: is_reason(client, "engine"))
        assert not running.processes["frontend"].ready.done()

        running.start("engine0")
        await running.wait_ready()
        assert await is_healthy(client)
        assert (await client.post(CHAT, json=chat(max_tokens=1))).status_code == 200


async def is_reason(client: httpx.AsyncClient, text: str) -> bool:
    health = await client.get("/health")
    return health.status_code == 503 and text in health.json()["reason"]


@pytest.mark.parametrize(
    "order", list(itertools.permutations(["engine0", "processor", "frontend"]))
)
async def test_any_order_of_starting(start_pipeline: StartPipeline, order: tuple[str, ...]) -> None:
    async with start_pipeline(start=[], wait=False) as running:
        for name in order:
            child = running.start(name)
            # An engine and a processor are ready by themselves; a frontend when it can serve.
            if name != "frontend":
                await child.wait_ready()
            else:
                await eventually(lambda: lines_about(child, "listening on"))  # noqa: B023
        await running.wait_ready()
        async with http_client(running.url) as client:
            assert (await client.post(CHAT, json=chat(max_tokens=1))).status_code == 200


async def own_servers(stack: AsyncExitStack, children: Children) -> Any:
    nats = await stack.enter_async_context(nats_server(children))
    etcd = await stack.enter_async_context(etcd_server(children))
    return nats.child, etcd.child, server_environment(nats.url, etcd.url)


async def test_nats_goes_away_and_comes_back(
    start_pipeline: StartPipeline, children: Children
) -> None:
    """Running streams do not need NATS; new requests fail within bounds, and recover."""
    async with AsyncExitStack() as stack:
        nats, _, environment = await own_servers(stack, children)
        running = await stack.enter_async_context(
            start_pipeline(environment=environment, arguments={"engine": STEPS_OF_20_MS})
        )
        client = await stack.enter_async_context(http_client(running.url))
        answer = await stack.enter_async_context(stream(client, chat(max_tokens=4000)))
        await answer.read_text()
        nats.kill()
        await nats.wait()
        # The runtime gives up after 10 s, and once more for a second try; our client after 30 s.
        during = await asyncio.gather(
            client.post(CHAT, json=chat(max_tokens=1)),
            client.post(CHAT, json=chat(max_tokens=1, stream=True)),
            client.get("/health"),
        )
        assert [response.status_code for response in during] == [503] * 3
        assert (await client.get("/live")).status_code == 200
        seen = len(answer.text)
        await answer.read_text(seen + 10)
        nats.start_again()
        await nats.wait_ready()
        assert set((await statuses_until_served(client))[:-1]) <= {503}
        await answer.read_text(len(answer.text) + 10)
        assert all(child.running for child in running.processes.values())


async def test_nats_restarts_under_load(start_pipeline: StartPipeline, children: Children) -> None:
    async with AsyncExitStack() as stack:
        nats, _, environment = await own_servers(stack, children)
        running = await stack.enter_async_context(start_pipeline(environment=environment))
        client = await stack.enter_async_context(http_client(running.url))
        async with load(client) as work:
            await work.answers(10)
            await nats.restart()
            await work.answers(20)
        assert all("AssertionError 503: " in failure for failure in work.failures), work.failures
        assert await is_healthy(client)


async def test_etcd_restarts_under_load(start_pipeline: StartPipeline, children: Children) -> None:
    """Requests do not need etcd, and leases outlive a restart.

    The runtime reconnects its watches and its lease one after another with growing pauses, so a
    lease has to be a good deal longer than the outage.
    """
    async with AsyncExitStack() as stack:
        _, etcd, environment = await own_servers(stack, children)
        environment["ETCD_LEASE_TTL"] = "20"
        running = await stack.enter_async_context(
            start_pipeline(environment=environment, arguments={"engine": STEPS_OF_20_MS})
        )
        client = await stack.enter_async_context(http_client(running.url))
        async with load(client) as work:
            await work.answers(10)
            etcd.kill()
            await etcd.wait()
            await work.answers(20)
            etcd.start_again()
            await etcd.wait_ready()
            await work.answers(20)
        assert not work.failures
        # What etcd tells now still arrives, if late: the engine is restarted and found.
        running.processes["engine0"].terminate()
        await running.processes["engine0"].wait()
        running.start("engine0")
        await statuses_until_served(client, timeout=60)
        await eventually(lambda: is_healthy(client), timeout=60)


async def test_etcd_is_away_longer_than_the_lease(
    start_pipeline: StartPipeline, children: Children
) -> None:
    """Nobody could find such a process again: it finishes what runs and ends with status 1."""
    async with AsyncExitStack() as stack:
        _, etcd, environment = await own_servers(stack, children)
        environment["ETCD_LEASE_TTL"] = "5"
        running = await stack.enter_async_context(
            start_pipeline(environment=environment, arguments={"engine": STEPS_OF_20_MS})
        )
        client = await stack.enter_async_context(http_client(running.url))
        answer = await stack.enter_async_context(stream(client, chat(max_tokens=400)))
        await answer.read_text()
        etcd.kill()
        await etcd.wait()
        ended = [child.wait(timeout=60) for child in running.processes.values()]
        waiting = asyncio.gather(*ended)
        await answer.read_all()
        assert answer.finish_reason == "length", "what runs is finished"
        assert await waiting == [1, 1, 1]
        for child in running.processes.values():
            assert lines_about(child, "lost its etcd lease")
        etcd.start_again()
        await etcd.wait_ready()
        for name in running.processes:
            running.start(name)
        await running.wait_ready()
        await eventually(lambda: is_healthy(client))  # the dead are listed for a while


async def test_an_engine_that_fails_ends_its_process(
    start_pipeline: StartPipeline, children: Children
) -> None:
    """Its callers get the cause, its supervisor a status that is not 0."""
    async with (
        start_pipeline(start=["processor", "frontend"], wait=False) as running,
        http_client(running.url) as client,
    ):
        command = [sys.executable, "-m", "tests.chapter1.failing_engine", "10"]
        command += ["--namespace", running.namespace, "--backend", "simulated"]
        engine = children.start("failing", command, running.environment)
        await running.wait_ready()
        async with stream(client, chat(max_tokens=100)) as answer:
            await answer.read_all()
        assert answer.error is not None
        assert "out of memory (injected)" in answer.error["message"]
        assert await engine.wait(timeout=30) == 1
        assert lines_about(engine, "failed: out of memory (injected)")


async def test_no_process_outlives_the_pipeline(start_pipeline: StartPipeline) -> None:
    """Components start no processes of their own, and none of them is left."""
    async with start_pipeline(engines=2) as running:
        pids = [child.pid for child in running.processes.values()]
        assert not [child for pid in pids for child in psutil.Process(pid).children()]
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
