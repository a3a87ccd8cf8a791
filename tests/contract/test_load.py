"""What an engine says about itself and its load, and what it does when there is too much."""

import asyncio

from common.engines.base import Engine
from common.protocol import EngineOutput, GenerateRequest, PipelineError, SamplingParams
from tests.chapter1.helpers import eventually
from tests.common.engines.engine_helpers import FakeContext
from tests.contract.backends import CACHE_TOKENS, Backend
from tests.contract.requests import COUNT, ask, idle, new_prompt

import pytest

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_what_it_is(backend: Backend, engine: Engine) -> None:
    info = engine.info
    assert (info.backend, info.worker_id) == (backend.name, 0)
    assert info.model.endswith("SmolLM2-135M-Instruct")
    assert info.block_size >= 16
    assert info.total_blocks * info.block_size >= CACHE_TOKENS
    assert 256 <= info.context_length <= info.total_blocks * info.block_size
    assert info.simulated is not backend.has_model
    assert not engine.failed.done()


async def test_counters(engine: Engine) -> None:
    """Prompts, what of them was cached, and outputs are counted once each."""
    size = engine.info.block_size
    prompt = new_prompt(2 * size + 1)
    before = await idle(engine)
    results = [await ask(engine, prompt, max_tokens=5, ignore_eos=True) for _ in range(2)]
    after = await idle(engine)
    cached = sum(result.items[0].cached_tokens or 0 for result in results)
    assert after.prompt_tokens - before.prompt_tokens == 2 * len(prompt)
    assert after.cached_tokens - before.cached_tokens == cached
    assert after.output_tokens - before.output_tokens == 10
    assert after.total_blocks == engine.info.total_blocks


async def test_the_load_while_requests_run(engine: Engine) -> None:
    context = FakeContext()
    prompt = new_prompt(3 * engine.info.block_size)
    sampling = SamplingParams(max_tokens=100, ignore_eos=True, temperature=0)

    async def read() -> None:
        while not context.is_stopped():  # until the test has seen it
            async for _ in engine.generate(GenerateRequest(prompt, sampling), context):
                pass

    readers = [asyncio.create_task(read()) for _ in range(2)]
    await eventually(lambda: engine.metrics().running == 2)
    await eventually(lambda: engine.metrics().used_blocks >= 3)
    assert engine.metrics().used_blocks <= engine.metrics().total_blocks
    context.stop()
    await asyncio.gather(*readers)
    await idle(engine)


async def test_more_requests_than_it_takes(backend: Backend, engine: Engine) -> None:
    """Each of them is served or told to come back later; nothing hangs, and it goes on."""
    context = FakeContext()
    many = 40

    async def read(number: int) -> str:
        sampling = SamplingParams(max_tokens=60, ignore_eos=True, temperature=0)
        last: EngineOutput | None = None
        try:
            async for item in engine.generate(GenerateRequest([*COUNT, number], sampling), context):
                last = item
        except PipelineError as error:
            return error.info.kind
        assert last is not None
        return str(last.finish_reason)

    readers = [asyncio.create_task(read(number)) for number in range(many)]
    if backend.bounded:
        await eventually(lambda: any(reader.done() for reader in readers), timeout=60)
        context.stop()
    outcomes = await asyncio.gather(*readers)
    assert set(outcomes) <= {"length", "cancelled", "overloaded"}
    assert ("overloaded" in outcomes) == backend.bounded
    await idle(engine)
    assert (await ask(engine, COUNT, max_tokens=2, ignore_eos=True)).finish_reason == "length"
