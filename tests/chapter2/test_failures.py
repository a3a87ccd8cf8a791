"""Engines, routers and processors die, freeze and leave: who notices, and what goes on working."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from launch.child import Child
from launch.children import Children
from launch.pipeline import Pipeline
from launch.ports import free_port
from tests.chapter1.helpers import (
    CHAT,
    chat,
    end_lease,
    engine_settings,
    eventually,
    http_client,
    is_healthy,
    lines_about,
    load,
    logged,
    stream,
)
from tests.chapter1.test_failures import is_reason, statuses_until_served
from tests.chapter2.conftest import RouterOf
from tests.chapter2.helpers import Router, ask, prompt
from tests.conftest import StartPipeline

import httpx
import psutil
import pytest

LONG_LEASE = {"ETCD_LEASE_TTL": "60"}  # what freezes is not to be taken for dead
DEBUG = ["--log-level=debug"]


async def cached_on_both(client: httpx.AsyncClient, router: Router) -> dict[int, str]:
    """Prompts that engines have cached: one of each, by worker id, which the router knows."""
    await router.wait_ready()
    prompts: dict[int, str] = {}
    for number in range(2):
        text = prompt(f"cached{number}", words=40)
        prompts[(await ask(client, text)).worker] = text
    assert sorted(prompts) == [0, 1]
    await eventually(router.is_right)
    return prompts


async def test_without_a_router(start_pipeline: StartPipeline, router_of: RouterOf) -> None:
    """Requests fail with a reason, /health tells it, and a router is all that is needed."""
    others = ["engine0", "engine1", "processor", "frontend"]
    async with (
        start_pipeline(chapter="chapter2", engines=2, start=others, wait=False) as running,
        http_client(running.url) as client,
    ):
        await eventually(lambda: lines_about(running.processes["frontend"], "listening on"))
        await eventually(lambda: is_reason(client, "No router is up"))
        for streamed in (False, True):
            response = await client.post(CHAT, json=chat(stream=streamed))
            assert response.status_code == 503
            error = response.json()["error"]
            assert error["code"] == "unavailable"
            assert (
                "No router is up; start one, or the processor with --router-fallback"
                in (error["message"])
            )
        assert not running.processes["frontend"].ready.done()
        running.start("router")
        await running.wait_ready()
        assert await is_healthy(client)
        await router_of(running).wait_ready()
        assert (await client.post(CHAT, json=chat(max_tokens=1))).status_code == 200


async def test_fallback(start_pipeline: StartPipeline, router_of: RouterOf) -> None:
    """With --router-fallback engines take turns as long as there is no router."""
    others = ["engine0", "engine1", "processor", "frontend"]
    arguments = {"processor": ["--router-fallback"]}
    async with (
        start_pipeline(
            chapter="chapter2", engines=2, start=others, arguments=arguments
        ) as running,
        http_client(running.url) as client,
    ):  # fmt: skip
        assert await is_healthy(client)
        text = prompt("the same")
        for worker in (0, 1):  # the processor may learn of one later than of the other
            await eventually(lambda: is_answered_by(client, text, worker))  # noqa: B023
        processor = running.processes["processor"]
        before = len(lines_about(processor, "round robin instead"))
        workers = [(await ask(client, text)).worker for _ in range(6)]
        assert workers in ([0, 1] * 3, [1, 0] * 3)

        running.start("router")
        await running.processes["router"].wait_ready()
        await router_of(running).wait_ready()
        routed = prompt("only one engine has this")
        assert len({(await ask(client, routed)).worker for _ in range(6)}) == 1

        running.processes["router"].kill()
        await running.processes["router"].wait()
        workers = [(await ask(client, text)).worker for _ in range(6)]
        assert set(workers) == {0, 1}
        assert await is_healthy(client)
        await logged(processor, "round robin instead", before + 12)
        assert not lines_about(processor, "did not answer within"), "who is dead is not waited for"


@pytest.mark.parametrize("fallback", [False, True])
async def test_a_router_that_hangs(
    start_pipeline: StartPipeline, servers: dict[str, str], fallback: bool
) -> None:
    """It is listed, and takes no request: nobody waits for it for long."""
    arguments = {"processor": ["--router-fallback"] if fallback else []}
    environment = {**servers, **LONG_LEASE}
    async with (
        start_pipeline(
            chapter="chapter2", engines=2, arguments=arguments, environment=environment
        ) as running,
        http_client(running.url) as client,
    ):
        assert (await client.post(CHAT, json=chat(max_tokens=1))).status_code == 200
        async with frozen(running, "router"):
            response = await client.post(CHAT, json=chat(max_tokens=1))
            message = "The router did not answer within 3 s."
            if fallback:
                assert response.status_code == 200
                processor = running.processes["processor"]
                await logged(processor, f"round robin instead: {message}")
            else:
                assert response.status_code == 503
                error = response.json()["error"]
                assert (error["code"], error["message"]) == ("unavailable", message)
        await statuses_until_served(client)


async def test_a_router_that_knows_no_engine(start_pipeline: StartPipeline) -> None:
    """Its answer is no reason to fall back; a client that does not wait for it is no failure."""
    arguments = {"processor": ["--router-fallback"], "router": DEBUG}
    async with (
        start_pipeline(chapter="chapter2", engines=1, arguments=arguments) as running,
        http_client(running.url) as client,
    ):
        assert (await client.post(CHAT, json=chat(max_tokens=1))).status_code == 200
        running.processes["engine0"].kill()
        await running.processes["engine0"].wait()
        refusals = 0

        async def router_answers() -> bool:
            nonlocal refusals
            response = await client.post(CHAT, json=chat(max_tokens=1))
            assert response.status_code == 503
            refusals += 1
            return "No engine with the model" in response.json()["error"]["message"]

        # The router waits for two seconds, the processor for three: a pause may spoil a try.
        await eventually(router_answers)
        with pytest.raises(httpx.ReadTimeout):
            await client.post(CHAT, json=chat(max_tokens=1), timeout=0.5)
        await eventually(router_answers)
        processor = running.processes["processor"]
        await logged(processor, "failed: ", refusals)
        assert not lines_about(processor, "gave no answer")
        for line in lines_about(processor, "round robin instead"):
            assert "The router did not answer within" in line


async def test_the_router_is_killed_and_restarted(
    start_pipeline: StartPipeline, router_of: RouterOf
) -> None:
    """What runs goes on, what comes fails; the new one has no state and is right in no time."""
    arguments = {"engine": engine_settings(decode_base_ms=10)}
    async with (
        start_pipeline(chapter="chapter2", engines=2, arguments=arguments) as running,
        http_client(running.url) as client,
    ):
        router = router_of(running)
        prompts = await cached_on_both(client, router)
        async with stream(client, chat(max_tokens=300)) as answer:
            await answer.read_text()
            running.processes["router"].kill()
            await running.processes["router"].wait()
            response = await client.post(CHAT, json=chat())
            assert response.status_code == 503
            assert "router" in response.json()["error"]["message"]
            assert await is_reason(client, "router"), "though it is listed for a while"
            await answer.read_all()
        assert answer.finish_reason == "length"

        running.start("router")
        await eventually(lambda: has_started(router))
        await eventually(router.is_right)
        assert all((await router.blocks()).values())
        for worker, text in prompts.items():
            again = await ask(client, text)
            assert again.worker == worker
            assert again.cached_tokens > again.prompt_tokens - 32
        assert await is_healthy(client)


async def has_started(router: Router) -> bool:
    try:
        return len(await router.state()) == 2
    except RuntimeError:
        return False


async def test_kill_9_of_one_of_two_engines(
    start_pipeline: StartPipeline, router_of: RouterOf
) -> None:
    """What had no token yet is answered by the other; the dead one's blocks are forgotten.

    It comes back with its worker id and on its ports, and has nothing cached.
    """
    async with (
        start_pipeline(
            chapter="chapter2",
            engines=2,
            start=[],
            wait=False,
            arguments={"engine": [*DEBUG, *engine_settings(prefill_chunk=64)]},
        ) as running,
        http_client(running.url, timeout=60) as client,
    ):
        ports = ["--kv-events-port", str(free_port()), "--metrics-port", str(free_port())]
        # It is killed during the prefill, of 20 s, of what it has begun.
        running.commands["engine0"] += [*ports, *engine_settings(prefill_tokens_per_s=100)]
        for name in running.commands:
            running.start(name)
        await running.wait_ready()
        router = router_of(running)
        prompts = await cached_on_both(client, router)
        before = {state.worker_id: state for state in await router.state()}
        assert before[0].blocks > 6

        dying, other = running.processes["engine0"], running.processes["engine1"]

        def begun(*engines: Child) -> int:
            return sum(len(lines_about(engine, "prompt of")) for engine in engines)

        await eventually(lambda: begun(dying, other) == 2)
        asked = [
            asyncio.create_task(ask(client, prompt(text, words=500)))
            for text in ("one", "two", "three", "four")
        ]
        await eventually(lambda: begun(dying, other) == 2 + len(asked))
        lost = begun(dying) - 1
        assert lost > 0
        dying.kill()
        await dying.wait()
        assert [(await request).worker for request in asked] == [1] * 4
        await logged(running.processes["processor"], "trying another", lost)
        await check_forgotten(router, before[0].instance_id)
        assert (await ask(client, prompts[0])).worker == 1

        running.start("engine0")
        await dying.wait_ready()
        await end_lease(running, before[0].instance_id)
        await eventually(lambda: is_followed(router, before[0].instance_id))
        engine0, _ = await router.state()
        assert (engine0.blocks, engine0.state) == (0, "ready")
        await eventually(router.is_right)
        source = await router.source(engine0.instance_id)
        assert source.events.endswith(f":{ports[1]}")
        assert source.metrics.endswith(f":{ports[3]}")
        answers = [await ask(client, prompt(f"new{n}", words=10)) for n in range(4)]
        assert {answer.worker for answer in answers} == {0, 1}
        await eventually(router.is_right)
        assert (await router.state())[0].blocks > 0


async def check_forgotten(router: Router, instance: int) -> None:
    """The failed stream told it all: whether discovery still lists the engine does not matter."""
    states = {state.instance_id: state for state in await router.state()}
    if instance in states:
        assert (states[instance].state, states[instance].blocks) == ("failed", 0)
    found = await router.find(list(range(64)))
    assert [candidate.worker_id for candidate in found.candidates] == [1]


async def is_followed(router: Router, former: int) -> bool:
    """Whether engine 0 is followed again, and the router no longer knows its former instance."""
    states = [(state.worker_id, state.state) for state in await router.state()]
    return states == [(0, "ready"), (1, "ready")] and former not in await router.blocks()


async def test_kill_9_under_load(start_pipeline: StartPipeline) -> None:
    """Of the requests under way only those fail whose first token had been sent."""
    arguments = {"engine": engine_settings(decode_base_ms=20)}
    async with (
        start_pipeline(chapter="chapter2", engines=2, arguments=arguments) as running,
        http_client(running.url) as client,
    ):
        async with load(client, clients=8) as work:
            await work.answers(20)
            running.processes["engine0"].kill()
            await running.processes["engine0"].wait()
            await work.answers(40)
            running.start("engine0")
            await running.processes["engine0"].wait_ready()
            await work.answers(40)
        assert all("stream ended: " in failure for failure in work.failures), work.failures
        assert len(work.failures) <= 8


async def test_kill_9_of_four_of_five_engines(
    start_pipeline: StartPipeline, router_of: RouterOf
) -> None:
    """However many of the listed engines refuse a request, one that is there answers it."""
    async with (
        start_pipeline(chapter="chapter2", engines=5) as running,
        http_client(running.url) as client,
    ):
        await router_of(running).wait_ready(5)
        assert (await client.post(CHAT, json=chat(max_tokens=1))).status_code == 200
        for number in range(4):
            running.processes[f"engine{number}"].kill()
            await running.processes[f"engine{number}"].wait()
        answers = await asyncio.gather(*(ask(client, prompt(f"new{n}")) for n in range(4)))
        assert [answer.worker for answer in answers] == [4] * 4


async def test_kill_9_of_two_of_three_engines_under_load(start_pipeline: StartPipeline) -> None:
    arguments = {"engine": engine_settings(decode_base_ms=20)}
    async with (
        start_pipeline(chapter="chapter2", engines=3, arguments=arguments) as running,
        http_client(running.url) as client,
    ):
        async with load(client, clients=8) as work:
            await work.answers(20)
            for name in ("engine0", "engine1"):
                running.processes[name].kill()
            await work.answers(40)
        assert all("stream ended: " in failure for failure in work.failures), work.failures


async def test_the_only_engine_dies(start_pipeline: StartPipeline) -> None:
    async with (
        start_pipeline(chapter="chapter2", engines=1) as running,
        http_client(running.url) as client,
    ):
        assert (await client.post(CHAT, json=chat(max_tokens=1))).status_code == 200
        running.processes["engine0"].kill()
        await running.processes["engine0"].wait()
        response = await client.post(CHAT, json=chat(max_tokens=1))
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "unavailable"
        running.start("engine0")
        assert set((await statuses_until_served(client))[:-1]) <= {503}
        assert [
            (await client.post(CHAT, json=chat(f"{n}", max_tokens=1))).status_code
            for n in range(10)
        ] == [200] * 10


async def test_an_engine_that_leaves_under_load_loses_no_request(
    start_pipeline: StartPipeline, router_of: RouterOf
) -> None:
    """A rolling restart; the router forgets what the engine had, and follows it when it is back."""
    arguments = {"engine": engine_settings(decode_base_ms=20)}
    async with (
        start_pipeline(chapter="chapter2", engines=2, arguments=arguments) as running,
        http_client(running.url) as client,
    ):
        router = router_of(running)
        await router.wait_ready()
        async with load(client, clients=8) as work:
            for name in ("engine0", "engine1", "engine0"):
                await work.answers(10)
                running.processes[name].terminate()
                assert await running.processes[name].wait(timeout=30) == 0
                await eventually(lambda: knows_one(router))
                await work.answers(10)
                running.start(name)
                await running.processes[name].wait_ready()
                await router.wait_ready()
        assert not work.failures
        await eventually(router.is_right)


async def knows_one(router: Router) -> bool:
    return [state.state for state in await router.state()] == ["ready"]


async def test_an_engine_that_freezes(
    start_pipeline: StartPipeline, router_of: RouterOf, servers: dict[str, str]
) -> None:
    """No sign of life: nothing is sent to it as long as there is another; then it is back."""
    environment = {**servers, **LONG_LEASE}
    async with (
        start_pipeline(chapter="chapter2", engines=2, environment=environment) as running,
        http_client(running.url) as client,
    ):
        router = router_of(running)
        prompts = await cached_on_both(client, router)
        async with frozen(running, "engine0"):
            await eventually(lambda: is_state(router, "silent"))
            for text in (prompts[0], "something", "else"):
                assert (await ask(client, text)).worker == 1
        await eventually(lambda: is_state(router, "ready"))
        # Both have that prompt now; what was routed before counts until the next figures come.
        await eventually(lambda: is_answered_by(client, prompts[0], worker=0))
        await eventually(router.is_right)


async def is_answered_by(client: httpx.AsyncClient, text: str, worker: int) -> bool:
    return (await ask(client, text)).worker == worker


async def is_state(router: Router, expected: str) -> bool:
    return (await router.state())[0].state == expected


@asynccontextmanager
async def frozen(running: Pipeline, name: str) -> AsyncIterator[None]:
    process = psutil.Process(running.processes[name].pid)
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


async def test_the_others_restart_alone(
    start_pipeline: StartPipeline, router_of: RouterOf
) -> None:  # fmt: skip
    """What is cached, and known to be, does not depend on processors and frontends."""
    async with start_pipeline(chapter="chapter2", engines=2) as running:
        router = router_of(running)
        async with http_client(running.url) as client:
            prompts = await cached_on_both(client, router)
            running.processes["processor"].kill()
            await running.processes["processor"].wait()
            running.start("processor")
            await statuses_until_served(client)
            for worker, text in prompts.items():
                assert (await ask(client, text)).worker == worker
        await running.processes["frontend"].restart()
        async with http_client(running.url) as client:
            for worker, text in prompts.items():
                assert (await ask(client, text)).worker == worker


async def test_two_routers(
    start_pipeline: StartPipeline, router_of: RouterOf, children: Children
) -> None:
    """They take turns, know the same, and one of them is enough.

    What a router was asked just before it is killed has no answer; chapter 3 asks another one.
    """
    arguments = {"router": DEBUG, "engine": engine_settings(decode_base_ms=20)}
    async with (
        start_pipeline(chapter="chapter2", engines=2, arguments=arguments) as running,
        http_client(running.url) as client,
    ):
        router = router_of(running)
        first = running.processes["router"]
        second = children.start("router2", running.commands["router"], running.environment)
        await second.wait_ready()
        await eventually(lambda: count(router, 2))
        for instance in await router.routers():
            await eventually(lambda: knows_both(router, instance))  # noqa: B023
        async with load(client, clients=8) as work:
            await work.answers(30)
            for asked in (first, second):
                await eventually(lambda: lines_about(asked, "best score"))  # noqa: B023
            first.terminate()
            assert await first.wait(timeout=20) == 0
            await work.answers(20)
            running.start("router")
            await first.wait_ready()
            assert not work.failures
            second.kill()
            await second.wait()
            await work.answers(30)
        assert all("did not answer within" in failure for failure in work.failures), work.failures
        assert len(work.failures) <= 8


async def count(router: Router, routers: int) -> bool:
    return len(await router.routers()) == routers


async def knows_both(router: Router, instance: int) -> bool:
    return [state.state for state in await router.state(instance)] == ["ready"] * 2
