"""The prefix cache, and that KV events tell exactly what is in it."""

import random

from common.engines.base import Engine
from common.kv_mirror import KvMirror
from common.protocol import PipelineError
from tests.chapter1.helpers import eventually
from tests.common.engines.engine_helpers import FakeContext
from tests.contract.backends import Backend
from tests.contract.requests import ask, idle, new_prompt
from tests.contract.test_cancellation import ENDLESS

import pytest

pytestmark = pytest.mark.asyncio(loop_scope="session")


def mirrored(mirror: KvMirror, token_ids: list[int], block_size: int) -> int:
    """How many of a prompt's first tokens are cached, as the events have it."""
    children = {content: block for block, content in mirror.blocks.items()}
    parent, length = None, 0
    while length + block_size <= len(token_ids):
        tokens = tuple(token_ids[length : length + block_size])
        block = children.get((parent, tokens))
        if block is None:
            break
        parent, length = block, length + block_size
    return length


async def cached(engine: Engine, prompt: list[int]) -> int:
    """How much of a prompt the engine finds in its cache."""
    count = (await ask(engine, prompt, max_tokens=1)).items[0].cached_tokens
    assert count is not None
    return count


async def agree(engine: Engine, mirror: KvMirror, prompt: list[int], length: int) -> None:
    """Wait until the events say that so much of the prompt is cached."""
    await eventually(lambda: mirrored(mirror, prompt, engine.info.block_size) == length)


async def test_a_prefix_is_reused(engine: Engine, mirror: KvMirror) -> None:
    """Full blocks of it are; another prompt that begins alike shares just those."""
    size = engine.info.block_size
    prompt = new_prompt(4 * size + size // 2)
    assert await cached(engine, prompt) == 0
    await agree(engine, mirror, prompt, 4 * size)
    assert await cached(engine, prompt) == 4 * size
    other = [*prompt[: 2 * size + 1], *new_prompt(size)]
    assert await cached(engine, other) == 2 * size


async def test_an_output_is_cached_too(engine: Engine, mirror: KvMirror) -> None:
    """The next turn of a chat begins with the answer of the one before."""
    size = engine.info.block_size
    prompt = new_prompt(size)
    answer = (await ask(engine, prompt, max_tokens=size + 4, ignore_eos=True)).token_ids
    await agree(engine, mirror, [*prompt, *answer], 2 * size)
    assert await cached(engine, [*prompt, *answer, *new_prompt(3)]) == 2 * size


async def test_events_tell_what_is_cached(engine: Engine, mirror: KvMirror) -> None:
    """Also when old blocks make room for new ones: each prompt is cached as far as they say."""
    size, total = engine.info.block_size, engine.info.total_blocks
    shared = new_prompt(2 * size)
    prompts = []
    for _ in range(total // 3 + 1):
        prompts.append([*shared, *new_prompt(3 * size + 1)])
        await ask(engine, prompts[-1], max_tokens=1)
    await idle(engine)
    await agree(engine, mirror, prompts[-1], 5 * size)
    assert len(mirror.blocks) <= total
    assert any(mirrored(mirror, prompt, size) < 5 * size for prompt in prompts)
    for prompt in random.Random(1).sample(prompts, 4):
        expected = mirrored(mirror, prompt, size)
        assert await cached(engine, prompt) == expected
        await agree(engine, mirror, prompt, 5 * size)
    assert len(mirror.blocks) <= total


async def test_a_cleared_cache(engine: Engine, mirror: KvMirror) -> None:
    size = engine.info.block_size
    prompt = new_prompt(3 * size + 1)
    await ask(engine, prompt, max_tokens=1)
    await agree(engine, mirror, prompt, 3 * size)
    await idle(engine)
    await engine.clear_cache()
    await eventually(lambda: not mirror.blocks)
    assert await cached(engine, prompt) == 0
    await agree(engine, mirror, prompt, 3 * size)


async def test_a_cache_in_use(backend: Backend, engine: Engine, mirror: KvMirror) -> None:
    """A running request keeps what it has, or the cache is not cleared at all."""
    context = FakeContext()
    tokens, tried = 0, False
    async for item in engine.generate(ENDLESS, context):
        tokens += len(item.token_ids)
        if tokens >= 20 and not tried:
            tried = True
            if backend.clears_when_idle:
                with pytest.raises(PipelineError, match="only while no request") as error:
                    await engine.clear_cache()
                assert error.value.info.kind == "overloaded"
            else:
                await engine.clear_cache()
        elif tried:
            context.stop()
    assert item.finish_reason == "cancelled"
    await idle(engine)
