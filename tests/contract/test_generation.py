"""Tokens in, tokens out: answers, streaming, when an output ends, how one is continued."""

import asyncio
from contextlib import aclosing

from common.engines.base import Engine
from common.engines.llama_capi import Vocab
from common.protocol import GenerateRequest, SamplingParams
from tests.common.engines.engine_helpers import FakeContext
from tests.contract.backends import Backend
from tests.contract.requests import CAPITAL, COUNT, PARIS, ask

import pytest

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_equal_prompts_have_equal_answers(backend: Backend, engine: Engine) -> None:
    first, second = [await ask(engine, COUNT, max_tokens=6) for _ in range(2)]
    assert first.token_ids == second.token_ids
    assert len(first.token_ids) == 6
    if backend.has_model:
        assert (await ask(engine, CAPITAL, max_tokens=1)).token_ids == [PARIS]


async def test_tokens_come_as_they_are_made(engine: Engine) -> None:
    """Not all at the end; those that are made while nobody reads come together."""
    sampling = SamplingParams(max_tokens=300, temperature=0, ignore_eos=True)
    items = engine.generate(GenerateRequest(COUNT, sampling), FakeContext())
    async with aclosing(items):
        for _ in range(5):
            assert (await anext(items)).finish_reason is None


async def test_what_the_first_and_the_last_item_say(engine: Engine) -> None:
    result = await ask(engine, COUNT, max_tokens=12, ignore_eos=True)
    first, *others = result.items
    assert first.worker_id == engine.info.worker_id
    assert first.cached_tokens == 0
    assert all(item.worker_id is None and item.cached_tokens is None for item in others)
    *before, last = result.items
    assert all(item.finish_reason is None and item.timings is None for item in before)
    assert last.finish_reason == "length"
    assert last.timings is not None
    assert min(last.timings.queue_ms, last.timings.prefill_ms, last.timings.decode_ms) >= 0
    assert last.timings.prefill_ms + last.timings.decode_ms > 0


@pytest.mark.parametrize("count", [1, 7])
async def test_as_many_tokens_as_asked_for(engine: Engine, count: int) -> None:
    result = await ask(engine, COUNT, max_tokens=count, ignore_eos=True)
    assert (len(result.token_ids), result.finish_reason) == (count, "length")


async def test_the_context_is_the_limit(engine: Engine) -> None:
    """The longest input, and an output as long as there is room for."""
    length = engine.info.context_length
    prompt = [token % 2000 + 100 for token in range(length - 3)]
    result = await ask(engine, prompt, ignore_eos=True)
    assert (len(result.token_ids), result.finish_reason) == (3, "length")


async def test_a_stop_id_ends_the_output_and_is_no_part_of_it(engine: Engine) -> None:
    tokens = (await ask(engine, COUNT, max_tokens=8, ignore_eos=True)).token_ids
    stop = tokens[2]
    result = await ask(engine, COUNT, max_tokens=8, stop_token_ids=[stop])
    assert (result.token_ids, result.finish_reason) == (tokens[: tokens.index(stop)], "stop")
    result = await ask(engine, COUNT, max_tokens=8, stop_token_ids=[stop], ignore_eos=True)
    assert (result.token_ids, result.finish_reason) == (tokens[: tokens.index(stop)], "stop")


async def test_a_stop_id_that_comes_at_once(engine: Engine) -> None:
    first = (await ask(engine, COUNT, max_tokens=1, ignore_eos=True)).token_ids
    result = await ask(engine, COUNT, max_tokens=8, stop_token_ids=first)
    assert (result.token_ids, result.finish_reason) == ([], "stop")
    assert result.items[0].worker_id == engine.info.worker_id


async def test_no_stop_before_min_tokens(engine: Engine) -> None:
    tokens = (await ask(engine, COUNT, max_tokens=8, ignore_eos=True)).token_ids
    result = await ask(engine, COUNT, max_tokens=8, stop_token_ids=[tokens[0]], min_tokens=5)
    assert len(result.token_ids) >= 5


async def test_the_end_of_the_answer(backend: Backend, engine: Engine, vocab: Vocab) -> None:
    """The model's own end token ends the output, unless that is to be ignored."""
    if not backend.has_model:
        return
    chat = "<|im_start|>user\nSay yes.<|im_end|>\n<|im_start|>assistant\n"
    prompt = vocab.encode(chat)
    result = await ask(engine, prompt, max_tokens=60)
    assert result.finish_reason == "stop"
    assert not vocab.eog_ids & set(result.token_ids)
    longer = await ask(engine, prompt, max_tokens=len(result.token_ids) + 3, ignore_eos=True)
    assert longer.finish_reason == "length"


@pytest.mark.parametrize("generated", [1, 4])
async def test_an_output_that_another_engine_began(engine: Engine, generated: int) -> None:
    """It goes on where that one was; `max_tokens` counts all of it."""
    whole = (await ask(engine, COUNT, max_tokens=8, ignore_eos=True)).token_ids
    prompt = [*COUNT, *whole[:generated]]
    rest = await ask(engine, prompt, generated, max_tokens=8, ignore_eos=True)
    assert (whole[:generated] + rest.token_ids, rest.finish_reason) == (whole, "length")


async def test_min_tokens_of_a_continued_output(engine: Engine) -> None:
    whole = (await ask(engine, COUNT, max_tokens=8, ignore_eos=True)).token_ids
    prompt, stop = [*COUNT, *whole[:3]], [whole[3]]
    at_once = await ask(engine, prompt, 3, max_tokens=8, min_tokens=3, stop_token_ids=stop)
    assert (at_once.token_ids, at_once.finish_reason) == ([], "stop")
    later = await ask(engine, prompt, 3, max_tokens=8, min_tokens=5, stop_token_ids=stop)
    assert len(later.token_ids) >= 2


async def test_answers_side_by_side(engine: Engine) -> None:
    """Each request gets its own tokens, however many there are at once."""
    lengths = range(3, 7)
    results = await asyncio.gather(
        *[ask(engine, COUNT, max_tokens=length, ignore_eos=True) for length in lengths]
    )
    assert [len(result.token_ids) for result in results] == list(lengths)
    assert all(result.items[0].worker_id is not None for result in results)


async def test_what_is_asked_before_it_is_read(engine: Engine) -> None:
    """A generator that is never read costs the engine nothing."""
    unread = engine.generate(GenerateRequest(COUNT, SamplingParams(max_tokens=5)), FakeContext())
    await unread.aclose()
    assert len((await ask(engine, COUNT, max_tokens=2, ignore_eos=True)).token_ids) == 2
