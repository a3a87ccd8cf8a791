"""A request that nobody wants any more costs nothing any more."""

import asyncio
from contextlib import aclosing

from common.engines.base import Engine
from common.protocol import EngineOutput, GenerateRequest, SamplingParams
from tests.common.engines.engine_helpers import FakeContext
from tests.contract.requests import COUNT, ask, idle

import pytest

pytestmark = pytest.mark.asyncio(loop_scope="session")

ENDLESS = GenerateRequest(COUNT, SamplingParams(max_tokens=300, temperature=0, ignore_eos=True))


async def test_a_stopped_request_ends_before_it_is_done(engine: Engine) -> None:
    """An engine with a thread of its own goes on while this one is slow to stop it."""
    context = FakeContext()
    items: list[EngineOutput] = []
    async for item in engine.generate(ENDLESS, context):
        items.append(item)
        if len(items) == 5:
            context.stop()
    assert items[-1].finish_reason == "cancelled"
    assert items[-1].timings is not None
    assert sum(len(item.token_ids) for item in items) < 300
    await idle(engine)


async def test_a_caller_who_leaves(engine: Engine) -> None:
    async with aclosing(engine.generate(ENDLESS, FakeContext())) as items:
        async for _ in items:
            break
    await idle(engine)


async def test_a_caller_who_is_cancelled(engine: Engine) -> None:
    began = asyncio.Event()

    async def read() -> None:
        async for _ in engine.generate(ENDLESS, FakeContext()):
            began.set()

    reading = asyncio.create_task(read())
    await began.wait()
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    await idle(engine)


async def test_a_request_that_is_stopped_before_it_begins(engine: Engine) -> None:
    context = FakeContext()
    context.stop()
    items = [item async for item in engine.generate(ENDLESS, context)]
    assert items[-1].finish_reason == "cancelled"
    assert sum(len(item.token_ids) for item in items) <= 2
    await idle(engine)


async def test_requests_that_wait_can_be_stopped(engine: Engine) -> None:
    """One that runs is not disturbed by those that are stopped while they wait."""
    context = FakeContext()
    whole = asyncio.create_task(ask(engine, COUNT, max_tokens=20, ignore_eos=True))

    async def wait_and_see() -> EngineOutput:
        async with aclosing(engine.generate(ENDLESS, context)) as items:
            return [item async for item in items][-1]

    others = [asyncio.create_task(wait_and_see()) for _ in range(5)]
    await asyncio.sleep(0)
    context.stop()
    assert {item.finish_reason for item in await asyncio.gather(*others)} == {"cancelled"}
    assert len((await whole).token_ids) == 20
    await idle(engine)
