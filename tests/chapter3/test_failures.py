"""Routers and engines come, go and die under load: nobody notices, and no account stays open."""

import asyncio
import random
from pathlib import Path

from tests.chapter1.helpers import (
    CHAT,
    chat,
    engine_settings,
    eventually,
    http_client,
    is_healthy,
    lines_about,
    load,
    stream,
)
from tests.chapter3.conftest import RouterOf
from tests.chapter3.helpers import Router, ask, prompt
from tests.conftest import StartPipeline

import httpx
import pytest

# What the router takes for under way decides, so that a test can read it from the scores.
COUNTS = """
def policy(snapshot):
    return [
        {"prefill": -worker.prefill_requests, "decode": -worker.decode_requests}
        for worker in snapshot.workers
    ]
"""


def counting(folder: Path) -> list[str]:
    (folder / "counts.py").write_text(COUNTS)
    return ["--policy", f"{folder / 'counts.py'}:policy"]


async def under_way(router: Router) -> int:
    """The requests that the router takes for under way."""
    found = await router.route([1, 2, 3])
    return -round(sum(candidate.score for candidate in found.candidates))


async def has_started(router: Router) -> bool:
    try:
        return len(await router.state()) == 2
    except RuntimeError:
        return False


async def test_fallback(start_pipeline: StartPipeline, router_of: RouterOf) -> None:
    """With --router-fallback engines take turns as long as there is no router."""
    others = ["engine0", "engine1", "processor", "frontend"]
    arguments = {"processor": ["--router-fallback"]}
    async with (
        start_pipeline(chapter="chapter3", engines=2, start=others, arguments=arguments) as running,
        http_client(running.url) as client,
    ):
        assert await is_healthy(client)
        text = prompt("the same")
        for worker in (0, 1):  # the processor may learn of one later than of the other
            await eventually(lambda: is_answered_by(client, text, worker))  # noqa: B023
        workers = [(await ask(client, text)).worker for _ in range(6)]
        assert workers in ([0, 1] * 3, [1, 0] * 3)

        running.start("router")
        await running.processes["router"].wait_ready()
        await router_of(running).wait_ready()
        routed = prompt("only one engine has this")
        assert len({(await ask(client, routed)).worker for _ in range(6)}) == 1

        running.processes["router"].kill()
        await running.processes["router"].wait()
        assert {(await ask(client, text)).worker for _ in range(6)} == {0, 1}
        assert await is_healthy(client)
        assert lines_about(running.processes["processor"], "round robin instead")


async def is_answered_by(client: httpx.AsyncClient, text: str, worker: int) -> bool:
    return (await ask(client, text)).worker == worker


async def test_the_router_is_killed_and_restarted(
    start_pipeline: StartPipeline, router_of: RouterOf, tmp_path: Path
) -> None:
    """What runs goes on, what comes fails; the new one has no state and is right in no time.

    It never heard of the requests that its predecessor routed, so their ends change nothing.
    """
    arguments = {"engine": engine_settings(decode_base_ms=10), "router": counting(tmp_path)}
    async with (
        start_pipeline(chapter="chapter3", engines=2, arguments=arguments) as running,
        http_client(running.url) as client,
    ):
        router = router_of(running)
        await router.wait_ready()
        async with stream(client, chat(max_tokens=400)) as answer:
            await answer.read_text()
            running.processes["router"].kill()
            await running.processes["router"].wait()
            response = await client.post(CHAT, json=chat())
            assert response.status_code == 503
            assert "router" in response.json()["error"]["message"]
            running.start("router")
            await running.processes["router"].wait_ready()
            await eventually(lambda: has_started(router))
            assert await under_way(router) == 0
            await answer.read_all()
        assert answer.finish_reason == "length"
        await eventually(router.is_right)
        assert (await client.post(CHAT, json=chat(max_tokens=1))).status_code == 200
        await eventually(lambda: nothing_under_way(router))


async def test_engines_leave_die_and_come_back_under_load(
    start_pipeline: StartPipeline, router_of: RouterOf, tmp_path: Path
) -> None:
    """No request fails, as an answer that broke off goes on at another engine."""
    arguments = {"engine": engine_settings(decode_base_ms=20), "router": counting(tmp_path)}
    async with (
        start_pipeline(chapter="chapter3", engines=2, arguments=arguments) as running,
        http_client(running.url) as client,
    ):
        router = router_of(running)
        await router.wait_ready()
        async with load(client, clients=8) as work:
            for name, dies in (("engine0", False), ("engine1", True), ("engine0", True)):
                await work.answers(10)
                engine = running.processes[name]
                if dies:
                    engine.kill()
                else:
                    engine.terminate()
                status = await engine.wait(timeout=30)
                assert dies or status == 0
                await work.answers(10)
                running.start(name)
                await engine.wait_ready()
                await eventually(lambda: all_ready(router), timeout=30)
        assert not work.failures
        await eventually(lambda: nothing_under_way(router))
        await eventually(router.is_right)


async def all_ready(router: Router) -> bool:
    """Also when one of its former lives is still listed."""
    ready = [state.worker_id for state in await router.state() if state.state == "ready"]
    return ready == [0, 1]


async def test_a_processor_that_is_restarted_under_load_leaves_no_account_open(
    start_pipeline: StartPipeline, router_of: RouterOf, tmp_path: Path
) -> None:
    arguments = {"engine": engine_settings(decode_base_ms=20), "router": counting(tmp_path)}
    async with (
        start_pipeline(chapter="chapter3", engines=2, arguments=arguments) as running,
        http_client(running.url) as client,
    ):
        router = router_of(running)
        await router.wait_ready()
        running.commands["processor1"] = running.commands["processor"]
        running.tiers.insert(0, ["processor1"])
        await running.start("processor1").wait_ready()
        async with load(client, clients=8) as work:
            for name in ("processor", "processor1"):
                await work.answers(20)
                await running.processes[name].restart()
        assert not work.failures
        await eventually(lambda: nothing_under_way(router))


async def test_clients_that_leave_at_any_moment_leave_no_account_open(
    start_pipeline: StartPipeline, router_of: RouterOf, tmp_path: Path
) -> None:
    """While the router is asked, while they wait, before the first token and after it."""
    slow = engine_settings(decode_base_ms=20, prefill_tokens_per_s=1000, prefill_chunk=64)
    arguments = {"engine": slow, "router": counting(tmp_path)}
    async with (
        start_pipeline(chapter="chapter3", engines=2, arguments=arguments) as running,
        http_client(running.url) as client,
    ):
        router = router_of(running)
        await router.wait_ready()
        rng = random.Random(0)

        async def leave(number: int) -> None:
            body = chat(prompt(f"{number}", words=200), max_tokens=100)
            with pytest.raises(httpx.ReadTimeout):
                await client.post(CHAT, json=body, timeout=httpx.Timeout(30, read=rng.random()))

        await asyncio.gather(*map(leave, range(60)))
        await eventually(lambda: nothing_under_way(router))


async def nothing_under_way(router: Router) -> bool:
    return await under_way(router) == 0
