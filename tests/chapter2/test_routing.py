"""Where requests go: to what is cached, and what each policy makes of it."""

import asyncio
import re
from collections import Counter
from contextlib import AsyncExitStack
from itertools import pairwise

from launch.pipeline import Pipeline
from tests.chapter1.helpers import (
    chat,
    engine_settings,
    eventually,
    http_client,
    lines_about,
    stream,
)
from tests.chapter2.conftest import RouterOf
from tests.chapter2.helpers import WORKER, Answer, Router, ask, prompt
from tests.conftest import StartPipeline

import httpx
import pytest


async def test_a_prompt_returns_to_the_engine_that_has_it(api: httpx.AsyncClient) -> None:
    text = prompt("again")
    first = await ask(api, text)
    assert first.cached_tokens < 32, "no more than the chat template's own tokens"
    for _ in range(5):
        again = await ask(api, text)
        assert again.worker == first.worker
        assert again.cached_tokens > first.prompt_tokens - 32


async def test_a_longer_prompt_with_the_same_beginning_follows(api: httpx.AsyncClient) -> None:
    text = prompt("beginning")
    first = await ask(api, text)
    for number in range(4):
        longer = await ask(api, f"{text} {prompt(f'end{number}', words=10)}")
        assert longer.worker == first.worker
        assert longer.cached_tokens > first.prompt_tokens - 48


async def test_a_prompt_follows_one_that_is_still_being_computed(api: httpx.AsyncClient) -> None:
    """What was just routed counts as cached before the engine can say so."""
    text = prompt("at once", words=400)
    answers = await asyncio.gather(*[ask(api, text) for _ in range(6)])
    assert len({answer.worker for answer in answers}) == 1


async def test_different_prompts_spread(api: httpx.AsyncClient, router: Router) -> None:
    """One after another, when load says nothing, and at once, before the load is heard of."""
    one_by_one = []
    for number in range(8):
        await heard(router, 0)
        one_by_one.append((await ask(api, prompt(f"other{number}", 30))).worker)
    await heard(router, 0)
    at_once = await asyncio.gather(*[ask(api, prompt(f"more{n}", 30)) for n in range(8)])
    for workers in (one_by_one, [answer.worker for answer in at_once]):
        assert set(Counter(workers)) == {0, 1}
        assert min(Counter(workers).values()) >= 2


async def test_what_the_router_says_is_what_the_engine_finds(
    shared_pipeline: Pipeline, api: httpx.AsyncClient, router: Router
) -> None:
    """Its overlap in tokens is the engine's own count of cached tokens, block for block."""
    processor = shared_pipeline.processes["processor"]
    tokens = list(range(500, 700))
    body = {"model": chat()["model"], "prompt": tokens, "max_tokens": 2, **WORKER}
    first = Answer((await api.post("/v1/completions", json=body)).json())
    await eventually(router.is_right)
    found = await router.find(tokens)
    again = Answer((await api.post("/v1/completions", json=body)).json())
    assert found.worker_id == first.worker == again.worker
    assert found.overlap_tokens == again.cached_tokens == 200 // 16 * 16
    assert found.overlap_blocks == 200 // 16
    await eventually(lambda: lines_about(processor, f"worker {again.worker}: best score of 2"))


async def test_kv_prefers_the_cache_to_an_idle_engine(
    api: httpx.AsyncClient,
) -> None:
    text = prompt("busy but mine")
    first = await ask(api, text)
    async with stream(api, chat(text, max_tokens=2000)) as running:
        await running.read_text()
        assert (await ask(api, text)).worker == first.worker


@pytest.mark.parametrize("policy", ["round_robin", "random", "least_loaded"])
async def test_policies(start_pipeline: StartPipeline, router_of: RouterOf, policy: str) -> None:
    arguments = {"engine": engine_settings(decode_base_ms=20), "router": ["--policy", policy]}
    async with (
        start_pipeline(chapter="chapter2", engines=2, arguments=arguments) as running,
        http_client(running.url) as client,
    ):
        router = router_of(running)
        await router.wait_ready()
        if policy == "least_loaded":
            await check_least_loaded(client, router)
            return
        if policy == "round_robin":  # the processor may learn of one later than of the other
            for worker in (0, 1):
                await eventually(lambda: is_answered_by(client, worker))  # noqa: B023
        workers = [(await ask(client, "the same", max_tokens=1)).worker for _ in range(24)]
        if policy == "round_robin":
            assert all(a != b for a, b in pairwise(workers))
            assert "its turn among 2" in (await router.find([1] * 32)).reason
        else:
            assert set(workers) == {0, 1}, "by chance once in eight million runs"
            assert any(a == b for a, b in pairwise(workers)), "as rarely"
            assert "random among 2" in (await router.find([1] * 32)).reason


async def is_answered_by(client: httpx.AsyncClient, worker: int) -> bool:
    return (await ask(client, "the same", max_tokens=1)).worker == worker


async def running_requests(router: Router) -> dict[int, int]:
    """What each engine has said last, by worker id."""
    return {s.worker_id: s.metrics.running for s in await router.state() if s.metrics}


async def check_least_loaded(client: httpx.AsyncClient, router: Router) -> None:
    """It goes where least runs, whatever is cached where more does."""
    text = prompt("cached where it is busy")
    async with AsyncExitStack() as first, AsyncExitStack() as second:
        answers = []
        for number in range(6):
            before = await heard(router, number)
            one = AsyncExitStack()
            answers.append(
                await one.enter_async_context(stream(client, chat(text, max_tokens=4000)))
            )
            await answers[-1].read_text()
            now = await heard(router, number + 1)
            worker = next(worker for worker in now if now[worker] > before[worker])
            await (first, second)[worker].enter_async_context(one)
        assert now == {0: 3, 1: 3}
        await first.aclose()
        assert await heard(router, 3) == {0: 0, 1: 3}
        assert (await ask(client, text)).worker == 0
        found = await router.find([1] * 32)
        assert (found.worker_id, found.overlap_blocks) == (0, 0)
        assert re.search("least loaded of 2: [012] running, [01] waiting", found.reason)
        busy = next(candidate for candidate in found.candidates if candidate.worker_id == 1)
        # One may count twice: as just routed, and in the figures that the engine sent since.
        assert busy.score in {-3.0, -4.0}
        assert busy.score == -(busy.running + busy.waiting)


async def heard(router: Router, total: int) -> dict[int, int]:
    """The running requests of each engine as soon as they are `total` in all."""
    running: dict[int, int] = {}

    async def is_total() -> bool:
        nonlocal running
        running = await running_requests(router)
        return len(running) == 2 and sum(running.values()) == total

    await eventually(is_total)
    return running
