"""Sick engines of a running pipeline lose their traffic within seconds, and get it back."""

import asyncio
import os
import signal
from collections import Counter

from tests.chapter1.helpers import engine_settings, eventually, http_client
from tests.chapter3.conftest import RouterOf
from tests.chapter3.helpers import Router, ask, prompt
from tests.conftest import StartPipeline

import httpx

POLICY = ["--policy", "round_robin"]


async def health_of(router: Router, worker: int) -> str:
    return (await router.workers())[worker].health


async def ask_some(client: httpx.AsyncClient, text: str, count: int = 6) -> Counter[int]:
    """Who answered; ten tokens each."""
    workers = [(await ask(client, prompt(f"{text} {n}", 5), max_tokens=10)).worker
               for n in range(count)]  # fmt: skip
    return Counter(workers)


async def test_a_stopped_engine_loses_its_traffic_and_gets_it_back(
    start_pipeline: StartPipeline, router_of: RouterOf, servers: dict[str, str]
) -> None:
    environment = {**servers, "ETCD_LEASE_TTL": "60"}  # it must not lose its lease meanwhile
    async with (
        start_pipeline(
            chapter="chapter3", engines=2, arguments={"router": POLICY}, environment=environment
        ) as running,
        http_client(running.url) as client,
    ):
        router = router_of(running)
        await router.wait_ready()

        async def both_serve() -> bool:
            return set(await ask_some(client, "both")) == {0, 1}

        await eventually(both_serve)
        engine = running.processes["engine1"]
        os.kill(engine.pid, signal.SIGSTOP)
        try:

            async def is_out() -> bool:
                return await health_of(router, 1) == "quarantined"

            await eventually(is_out)
            assert (await router.workers())[1].health_reason
            assert 1 not in await ask_some(client, "stopped")
        finally:
            os.kill(engine.pid, signal.SIGCONT)

        async def is_back() -> bool:
            return await health_of(router, 1) == "healthy"

        await eventually(is_back)
        await eventually(both_serve)


async def test_a_slow_engine_loses_its_traffic(
    start_pipeline: StartPipeline, router_of: RouterOf
) -> None:
    """It decodes twenty times slower than the other two."""
    async with (
        start_pipeline(
            chapter="chapter3",
            engines=3,
            start=["engine0", "engine1", "router", "processor", "frontend"],
            arguments={"router": POLICY, "engine": engine_settings(decode_base_ms=10)},
        ) as running,
        http_client(running.url) as client,
    ):
        running.commands["engine2"] += [*engine_settings(decode_base_ms=200), "--tag=old"]
        running.start("engine2")
        await running.wait_ready()
        router = router_of(running)
        await router.wait_ready(3)

        async def is_out() -> bool:
            await asyncio.gather(*(ask_some(client, f"slow {n}", 3) for n in range(2)))
            return await health_of(router, 2) == "quarantined"

        await eventually(is_out, timeout=60)
        assert 2 not in await ask_some(client, "without it")
        slow = (await router.workers())[2]
        assert "times what the others would take" in slow.health_reason
        assert slow.tags == ("old",)
