"""Chapter 3 with real engines that hand prompts over by NIXL.

Only where NIXL is installed: `scripts/test-engines nixl` names this file, and pytest finds it by
no other way.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from common.protocol import EngineMetrics
from launch.pipeline import Pipeline
from tests.chapter1.helpers import chat, eventually, http_client, lines_about
from tests.chapter3.conftest import RouterOf
from tests.chapter3.helpers import Router
from tests.chapter3.test_disaggregation_in_use import DEBUG, answer, whole_way
from tests.chapter3.test_migration_in_use import USAGE
from tests.conftest import StartPipeline

import httpx
import pytest

PREFILL, DECODE = "engine0", "engine1"
FEW_THREADS = ["--engine-arg=threads=1", "--engine-arg=batch_threads=1"]
ROUNDS = 2

StartEngines = Callable[[str, str], AbstractAsyncContextManager[tuple[Pipeline, httpx.AsyncClient]]]


@pytest.fixture
def start_engines(start_pipeline: StartPipeline, router_of: RouterOf) -> StartEngines:
    """A prefill and a decode engine by their ways of transfer, and a client."""

    @asynccontextmanager
    async def start(lends: str, borrows: str) -> AsyncIterator[tuple[Pipeline, httpx.AsyncClient]]:
        async with (
            start_pipeline(
                chapter="chapter3",
                engines=2,
                prefill=1,
                backend="llamacpp",
                start=[],
                arguments={"engine": [*DEBUG, *FEW_THREADS], "router": ["--no-canaries"]},
            ) as running,
            http_client(running.url, timeout=60) as client,
        ):
            running.commands[PREFILL] += ["--kv-transfer", lends]
            running.commands[DECODE] += ["--kv-transfer", borrows]
            for name in running.commands:
                running.start(name)
            await running.wait_ready()
            await router_of(running).wait_ready(2)
            yield running, client

    return start


def question(number: int) -> dict[str, Any]:
    """A prompt of more than 100 tokens, which is more than 2 MB of KV."""
    words = " ".join(f"colour {number * i}" for i in range(1, 30))
    return {**chat(words, temperature=0, max_tokens=8, seed=1, logprobs=True), **USAGE}


async def has_engines(router: Router, count: int) -> bool:
    return len(await router.engines()) == count


async def forget(router: Router) -> None:
    """The engines have nothing cached, as if they had just begun: then every bit is equal."""
    path = f"{router.running.namespace}.engine.clear_kv_blocks"
    for instance in await router.caller.instances(path):
        await router.caller.call(path, {}, EngineMetrics, instance)


async def transfers(router: Router) -> tuple[int, int]:
    """The decode engine's tokens that were received, and its transfers that failed."""
    _, decode = await router.workers()
    if decode.metrics is None:
        return 0, 0
    return decode.metrics.received_tokens, decode.metrics.failed_transfers


def logprobs(chunks: list[dict[str, Any]]) -> list[float]:
    return [
        token["logprob"]
        for chunk in chunks
        for choice in chunk["choices"]
        for token in (choice.get("logprobs") or {"content": []})["content"]
    ]


async def test_the_kv_comes_by_nixl_and_the_answer_is_that_of_one_engine(
    start_engines: StartEngines, router_of: RouterOf
) -> None:
    async with start_engines("nixl", "nixl") as (running, client):
        router = router_of(running)
        by_way, alone = [], []
        for number in range(ROUNDS):
            await forget(router)
            request_id, got, chunks = await answer(client, question(number))
            assert await whole_way(running, request_id, 2) == ([0, 1], [0])
            by_way.append((got, logprobs(chunks)))

        async def has_received() -> bool:
            return (await transfers(router))[0] > ROUNDS * 100

        await eventually(has_received)
        assert (await transfers(router))[1] == 0

        running.processes[DECODE].kill()
        await running.processes[DECODE].wait()
        await eventually(lambda: has_engines(router, 1))
        for number in range(ROUNDS):
            await forget(router)
            request_id, got, chunks = await answer(client, question(number))
            assert await whole_way(running, request_id, 1) == ([0], [])
            alone.append((got, logprobs(chunks)))
    assert [len(values) for _, values in alone] == [8] * ROUNDS
    assert alone == by_way


@pytest.mark.parametrize(("lends", "borrows"), [("zmq", "nixl"), ("nixl", "zmq")])
async def test_engines_that_transfer_by_different_ways_compute_and_say_so(
    start_engines: StartEngines, router_of: RouterOf, lends: str, borrows: str
) -> None:
    async with start_engines(lends, borrows) as (running, client):
        request_id, by_way, _ = await answer(client, question(1))
        assert await whole_way(running, request_id, 2) == ([0, 1], [0])

        async def has_failed() -> bool:
            return await transfers(router_of(running)) == (0, 1)

        await eventually(has_failed)
        reason = f"KV is lent by '{lends}', and this engine borrows by '{borrows}'"
        await eventually(lambda: bool(lines_about(running.processes[DECODE], reason)))
        _, alone, _ = await answer(client, question(1))
        assert alone == by_way


@pytest.mark.parametrize("moment", ["prompt of", "ended: handover"])
async def test_a_prefill_engine_that_is_killed_costs_no_answer(
    start_engines: StartEngines, router_of: RouterOf, moment: str
) -> None:
    """While it computes, and while what it lends is being read."""
    async with start_engines("nixl", "nixl") as (running, client):
        for number in range(2):
            prefill = running.processes[PREFILL]
            before = len(lines_about(prefill, moment))
            asked = asyncio.create_task(answer(client, question(number)))
            await eventually(lambda: len(lines_about(prefill, moment)) > before)  # noqa: B023
            prefill.kill()
            await prefill.wait()
            _, (_, reason, _, tokens), _ = await asked
            assert (reason, tokens) == ("length", 8)
            await running.start(PREFILL).wait_ready()
            await router_of(running).wait_ready(2)
