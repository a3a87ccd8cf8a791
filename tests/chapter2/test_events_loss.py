"""Events get lost; in the end the router believes of every cache what the engine itself says."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

from chapter2.workers import SILENT_AFTER_S
from common.kv import block_hashes
from launch.pipeline import Pipeline
from tests.chapter1.helpers import MODEL, engine_settings, eventually, http_client, lines_about
from tests.chapter2.conftest import RouterOf
from tests.chapter2.helpers import WORKER, Answer, Router
from tests.conftest import StartPipeline

import httpx
import pytest

BLOCK = 16
CACHE_BLOCKS = 64
# What heals a gap is the next message, a heartbeat at the latest, and a snapshot.
HEALED_S = 12.0  # not half a second, as a rule: a busy machine's delay

StartLossy = Callable[..., AbstractAsyncContextManager[Pipeline]]


@pytest.fixture
def start_lossy(start_pipeline: StartPipeline, tmp_path: Path) -> StartLossy:
    """Start a pipeline with two lossy engines, see `tests.chapter2.lossy_engine`."""

    @asynccontextmanager
    async def start_one(
        share: float, *, without: str = "", backend: str = "simulated", **settings: object
    ) -> AsyncIterator[Pipeline]:
        async with start_pipeline(
            chapter="chapter2",
            engines=2,
            start=[],
            wait=False,
            backend=backend,
            arguments={"engine": engine_settings(**settings)},
        ) as running:
            for name, command in running.commands.items():
                if name.startswith("engine"):
                    module = ["tests.chapter2.lossy_engine", str(share), str(tmp_path / "outage")]
                    command[command.index("chapter2.engine")] = module[0]
                    command[3:3] = module[1:]
                if name != without:
                    running.start(name)
            if not without:
                await running.wait_ready()
            yield running

    return start_one


def prompts(count: int, length: int, first: int, seed: int = 0) -> list[list[int]]:
    """Prompts of token ids from `first` on that share no first block with each other."""
    rng = random.Random(seed)
    return [
        [first + number, *[rng.randrange(first, first + 1000) for _ in range(length - 1)]]
        for number in range(count)
    ]


async def complete(client: httpx.AsyncClient, token_ids: list[int]) -> Answer:
    body = {"model": MODEL, "prompt": token_ids, "max_tokens": 2, **WORKER}
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return Answer(response.json())


def lost(running: Pipeline) -> int:
    """How many batches of events did not arrive, those without an event not counted."""
    return sum(
        " of 0 events" not in line
        for name in ("engine0", "engine1")
        for line in lines_about(running.processes[name], "lost batch")
    )


async def check_tree(router: Router) -> None:
    """What each engine has cached, the router finds in full by its tokens."""
    for instance in await router.engines():
        prefixes: dict[int | None, list[int]] = {None: []}
        for event in await router.snapshot(instance):
            tokens = prefixes[event.parent_block_hash]
            for number, block in enumerate(event.block_hashes):
                start = number * event.block_size
                tokens = [*tokens, *event.token_ids[start : start + event.block_size]]
                prefixes[block] = tokens
            found = await router.find(tokens)
            (candidate,) = [c for c in found.candidates if c.instance_id == instance]
            assert candidate.overlap_blocks == len(tokens) // event.block_size
        assert len(prefixes) > CACHE_BLOCKS // 2


async def test_random_loss(start_lossy: StartLossy, router_of: RouterOf) -> None:
    """Many batches are lost, among stores and evictions, again and again."""
    sizes = {"cache_tokens": CACHE_BLOCKS * BLOCK, "decode_base_ms": 1}
    async with (
        start_lossy(0.4, **sizes) as running,
        http_client(running.url) as client,
    ):  # fmt: skip
        router = router_of(running)
        await router.wait_ready()
        asked = prompts(60, 100, first=1000)
        for start in range(0, len(asked), 15):
            await asyncio.gather(*[complete(client, p) for p in asked[start : start + 15]])
            await eventually(router.is_right)
        await eventually(lambda: lost(running) > 3)
        await eventually(lambda: lines_about(running.processes["router"], "taking a snapshot"))
        for blocks in (await router.blocks()).values():
            assert CACHE_BLOCKS / 2 < len(blocks) <= CACHE_BLOCKS
        await check_tree(router)


async def test_events_alone_are_enough(start_lossy: StartLossy, router_of: RouterOf) -> None:
    """Stores and evictions without loss: the tree follows, and no snapshot covers a mistake."""
    sizes = {"cache_tokens": CACHE_BLOCKS * BLOCK, "decode_base_ms": 1}
    async with start_lossy(0.0, **sizes) as running, http_client(running.url) as client:
        router = router_of(running)
        await router.wait_ready()
        snapshots: list[str] = []
        for start in range(1000, 5000, 1000):
            # A subscription may reach its engine after the first snapshot has been asked for.
            if start == 2000:
                assert all((await router.blocks()).values()), "both have sent events"
                snapshots = lines_about(running.processes["router"], "taking a snapshot")
            await asyncio.gather(*[complete(client, p) for p in prompts(15, 100, first=start)])
            await eventually(router.is_right)
        for blocks in (await router.blocks()).values():
            assert CACHE_BLOCKS / 2 < len(blocks) <= CACHE_BLOCKS
        assert lines_about(running.processes["router"], "taking a snapshot") == snapshots


async def test_the_last_events_are_lost(
    start_lossy: StartLossy, router_of: RouterOf, tmp_path: Path
) -> None:
    """Nothing happens after them, so only a heartbeat's number tells."""
    async with (
        start_lossy(0.0) as running,
        http_client(running.url) as client,
    ):  # fmt: skip
        router = router_of(running)
        await router.wait_ready()
        for token_ids in prompts(4, 50, first=1000):
            await complete(client, token_ids)
        await eventually(router.is_right)
        (tmp_path / "outage").touch()
        for token_ids in prompts(4, 50, first=2000):
            await complete(client, token_ids)
        assert await eventually(router.is_right) < HEALED_S
        await eventually(lambda: lost(running) >= 4)
        assert sum(len(blocks) for blocks in (await router.blocks()).values()) == 8 * 3
        for token_ids in [*prompts(4, 50, first=1000), *prompts(4, 50, first=2000)]:
            assert (await router.find(token_ids)).overlap_blocks == 3
        clear = f"{running.namespace}.engine.clear_kv_blocks"
        for instance in await router.engines():
            await router.caller.call(clear, {}, dict, instance)
        assert await eventually(router.is_right) < HEALED_S
        assert [len(blocks) for blocks in (await router.blocks()).values()] == [0, 0]


async def test_events_that_end(start_lossy: StartLossy, router_of: RouterOf) -> None:
    """A connection may die without a sign while that of the load lives on: snapshots go on."""
    async with start_lossy(1.0) as running, http_client(running.url) as client:
        router = router_of(running)
        await router.wait_ready()
        for token_ids in prompts(4, 50, first=1000):
            await complete(client, token_ids)
        assert await eventually(router.is_right) < SILENT_AFTER_S + HEALED_S
        assert sum(len(blocks) for blocks in (await router.blocks()).values()) == 4 * 3
        assert [state.state for state in await router.state()] == ["ready", "ready"]


async def test_a_router_that_comes_late(start_lossy: StartLossy, router_of: RouterOf) -> None:
    """It never saw an event, and knows of each engine exactly what that has cached."""
    async with (
        start_lossy(0.3, without="router", cache_tokens=CACHE_BLOCKS * BLOCK) as running,
        http_client(running.url) as client,
    ):
        router = router_of(running)
        caller = router.caller
        generate = f"{running.namespace}.engine.generate"
        await eventually(lambda: lists(router, 2))
        asked = prompts(40, 100, first=1000)
        sampling = {"max_tokens": 2}
        for token_ids, instance in zip(asked, (await router.engines()) * 20, strict=True):
            await caller.call(
                generate, {"token_ids": token_ids, "sampling": sampling}, dict, instance
            )
        running.start("router")
        began = time.monotonic()
        await running.wait_ready()
        await router.wait_ready()
        assert await eventually(router.is_right) < HEALED_S
        assert time.monotonic() - began < 30, "start-up included"
        cached = await router.engines_blocks()
        overlaps = []
        for token_ids in asked:
            hashes = block_hashes(token_ids, BLOCK)
            for candidate in (await router.find(token_ids)).candidates:
                known = [block in cached[candidate.instance_id] for block in hashes]
                expected = [*known, False].index(False)
                assert candidate.overlap_blocks == expected
                overlaps.append(expected)
        assert min(overlaps) == 0
        assert max(overlaps) == 100 // BLOCK
        assert (await complete(client, asked[0])).prompt_tokens == 100


async def lists(router: Router, engines: int) -> bool:
    return len(await router.engines()) == engines


async def test_the_real_engine(start_lossy: StartLossy, router_of: RouterOf) -> None:
    """llama.cpp with a small cache, real requests, evictions, and half of the batches lost."""
    size = {"cache_tokens": 256, "threads": 1, "batch_threads": 1}
    async with (
        start_lossy(0.5, backend="llamacpp", **size) as running,
        http_client(running.url, timeout=60) as client,
    ):
        router = router_of(running)
        await router.wait_ready()
        asked: list[list[int]] = []
        while not lost(running):
            asked += prompts(8, 72, first=1000 + 1000 * len(asked))
            await asyncio.gather(*[complete(client, p) for p in asked[-8:]])
            await eventually(router.is_right)
        cached = await router.engines_blocks()
        assert all(0 < len(blocks) <= 256 // BLOCK for blocks in cached.values())
        everywhere = frozenset[int]().union(*cached.values())
        assert len(everywhere) < len(asked) * (72 // BLOCK), "something was evicted"
        again = next(p for p in reversed(asked) if block_hashes(p, BLOCK)[-1] in everywhere)
        found = await router.find(again)
        answer = await complete(client, again)
        assert answer.worker == found.worker_id
        assert answer.cached_tokens == found.overlap_tokens == 64
        await eventually(router.is_right)
