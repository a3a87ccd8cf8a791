"""A prompt computed by one real engine and decoded by another: the answer is that of one engine.

The engines of a comparison have computed the same before, so that their batches and their cells
have the same shapes; then every bit is equal.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

from common.engines.llama_capi import Vocab
from common.kv import block_hashes
from common.model_files import DEFAULT_MODEL, find_model
from common.protocol import EngineOutput, GenerateRequest, SamplingParams
from tests.chapter1.helpers import eventually
from tests.common.engines.engine_helpers import Result, collect, replay
from tests.common.engines.handover_helpers import (
    BLOCK,
    Peer,
    a_prompt,
    compute,
    decode_request,
    hand_over,
    held,
    start,
    two_engines,
)
from tests.common.engines.handover_soak import soak

import pytest
import pytest_asyncio

pytestmark = pytest.mark.asyncio(loop_scope="module")

GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 6, "logprobs": 2}
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 4}},
        "required": ["city"],
        "additionalProperties": False,
    }
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engines() -> AsyncIterator[tuple[Peer, Peer, Peer]]:
    """A prefill engine, a decode engine, and one that does it all."""
    async with AsyncExitStack() as stack:
        prefill, decode = await stack.enter_async_context(two_engines())
        yield prefill, decode, await stack.enter_async_context(Peer.start(worker_id=3))


Engines = tuple[Peer, Peer, Peer]


@pytest_asyncio.fixture(loop_scope="module")
async def fresh(engines: Engines) -> AsyncIterator[Engines]:
    """They have nothing cached, and lose nothing in the test."""
    for peer in engines:
        await peer.engine.clear_cache()
    yield engines
    for peer in engines:
        await peer.check_at_rest()


def assert_equal(handed_over: Result, local: Result) -> None:
    assert handed_over.token_ids == local.token_ids
    assert handed_over.logprobs == local.logprobs
    assert handed_over.finish_reason == local.finish_reason


@pytest.mark.parametrize("length", [2, 2 * BLOCK, 37])
async def test_a_whole_prompt_is_taken_over(fresh: Engines, length: int) -> None:
    """Shorter than a block, an exact multiple of it, and neither."""
    prefill, decode, alone = fresh
    fetched, received = decode.fetched_bytes, decode.engine.metrics().received_tokens
    prompt = a_prompt(length, length)
    answer = await hand_over(prefill, decode, prompt, **GREEDY)
    assert_equal(answer.whole, await collect(alone.engine, prompt, **GREEDY))
    kv = answer.first.kv
    assert kv is not None
    assert (kv.tokens, kv.model) == (length, find_model(DEFAULT_MODEL).name)
    assert decode.fetched_bytes - fetched == kv.data["size"]
    assert decode.engine.metrics().received_tokens - received == length
    assert answer.first.worker_id == 1
    assert answer.rest.items[0].worker_id == 2


async def test_the_timings_and_cached_tokens_of_both_are_reported(fresh: Engines) -> None:
    prefill, decode, _ = fresh
    answer = await hand_over(prefill, decode, a_prompt(1, 40), **GREEDY)
    assert (answer.first.cached_tokens, answer.rest.items[0].cached_tokens) == (0, 0)
    before, after = answer.first.timings, answer.rest.items[-1].timings
    assert before is not None
    assert after is not None
    assert min(before.prefill_ms, after.prefill_ms) > 0
    again = await hand_over(prefill, decode, a_prompt(1, 40), **GREEDY)
    assert (again.first.cached_tokens, again.rest.items[0].cached_tokens) == (32, 32)


async def test_only_the_blocks_that_are_missing_travel(fresh: Engines) -> None:
    """The engines have a common prefix, computed by each of them for itself."""
    prefill, decode, alone = fresh
    prefix = a_prompt(2, 3 * BLOCK)
    for peer in fresh:
        await collect(peer.engine, [*prefix, 5, 6], **{**GREEDY, "max_tokens": 2})
    fetched, received = decode.fetched_bytes, decode.engine.metrics().received_tokens
    prompt = [*prefix, *a_prompt(3, BLOCK + 5)]
    answer = await hand_over(prefill, decode, prompt, **GREEDY)
    assert_equal(answer.whole, await collect(alone.engine, prompt, **GREEDY))
    kv = answer.first.kv
    assert kv is not None
    pieces = kv.data["size"] - 3 * kv.data["piece_bytes"]
    assert decode.fetched_bytes - fetched == pieces
    assert decode.engine.metrics().received_tokens - received == BLOCK + 5
    assert answer.rest.items[0].cached_tokens == 3 * BLOCK


async def test_nothing_travels_that_is_cached(fresh: Engines) -> None:
    prefill, decode, _ = fresh
    prompt = a_prompt(4, 3 * BLOCK)
    first = await hand_over(prefill, decode, prompt, **GREEDY)
    fetched = decode.fetched_bytes
    again = await hand_over(prefill, decode, prompt, **GREEDY)
    assert again.whole.token_ids == first.whole.token_ids
    assert decode.fetched_bytes == fetched
    assert again.rest.items[0].cached_tokens == 3 * BLOCK


async def test_what_was_received_is_cached_and_announced(fresh: Engines) -> None:
    prefill, decode, _ = fresh
    prompt = a_prompt(5, 3 * BLOCK + 4)
    await hand_over(prefill, decode, prompt, **GREEDY)
    received = set(block_hashes(prompt, BLOCK))
    assert received <= replay(decode.events)
    assert received <= replay(prefill.events)
    local = await collect(decode.engine, prompt, **GREEDY)
    assert local.items[0].cached_tokens == 3 * BLOCK


async def test_requests_together_in_batches_of_one_shape(fresh: Engines) -> None:
    """One engine takes over three prompts, the other has them cached; then both decode them."""
    prefill, decode, alone = fresh
    prompts = [a_prompt(seed, 2 * BLOCK) for seed in (6, 7, 8)]
    firsts = [await compute(prefill, prompt, **GREEDY) for prompt in prompts]
    for prompt in prompts:
        await collect(alone.engine, prompt, **{**GREEDY, "max_tokens": 1})
    after_handover = await in_one_batch(
        decode,
        _requests(prompts, firsts),
    )
    cached = await in_one_batch(alone, _requests(prompts, firsts, kv=False))
    for one, other in zip(after_handover, cached, strict=True):
        assert len(one.token_ids) == 5
        assert_equal(one, other)


def _requests(
    prompts: list[list[int]], firsts: list[EngineOutput], *, kv: bool = True
) -> list[GenerateRequest]:
    """With what was computed, or as if it were cached."""
    return [
        decode_request(prompt, first, first.kv if kv else None, **GREEDY)
        for prompt, first in zip(prompts, firsts, strict=True)
    ]


async def in_one_batch(peer: Peer, requests: list[GenerateRequest]) -> list[Result]:
    """All of them begin in the same step, in order."""
    tasks = []
    with held(peer):
        for number, request in enumerate(requests, 1):
            tasks.append(start(peer, request))
            await eventually(lambda number=number: len(peer.engine._open) == number)  # type: ignore[misc]
    return await asyncio.gather(*tasks)


async def test_requests_with_a_common_prefix_together(fresh: Engines) -> None:
    """Both take over the same blocks; they are cached once."""
    prefill, decode, _ = fresh
    prefix = a_prompt(9, 2 * BLOCK)
    prompts = [[*prefix, 5, 6], [*prefix, 7, 8, 9]]
    firsts = [await compute(prefill, prompt, **GREEDY) for prompt in prompts]
    requests = _requests(prompts, firsts)
    results = await in_one_batch(decode, requests)
    assert [len(result.token_ids) for result in results] == [5, 5]
    assert replay(decode.events) == set(block_hashes(prefix, BLOCK))


async def test_engines_with_other_settings() -> None:
    """The chunk is the prefill engine's affair; the decode engine has other sequences."""
    prompt = a_prompt(12, 40)
    async with two_engines(
        {"prefill_chunk": 7}, {"max_sequences": 5, "max_running": 3, "import_blocks": 2}
    ) as (prefill, decode):
        answer = await hand_over(prefill, decode, prompt, **GREEDY)
        assert decode.engine.metrics().received_tokens == 40
        for peer in (prefill, decode):
            await peer.check_at_rest()
        local = await collect(prefill.engine, prompt, **GREEDY)
    assert answer.whole.token_ids == local.token_ids


@pytest.mark.parametrize(
    "sampling",
    [
        {"seed": 7, "temperature": 1.0, "top_p": 0.95},
        {"seed": 8, "temperature": 0.8, "frequency_penalty": 1.5, "presence_penalty": 0.7},
        {"temperature": 0.0, "logit_bias": [(1234, 4.0)], "min_tokens": 4},
    ],
)
async def test_sampling_goes_on_where_it_was(fresh: Engines, sampling: dict[str, Any]) -> None:
    prefill, decode, alone = fresh
    sampling = {**sampling, "max_tokens": 8, "logprobs": 1}
    prompt = a_prompt(13, 20)
    answer = await hand_over(prefill, decode, prompt, **sampling)
    assert_equal(answer.whole, await collect(alone.engine, prompt, **sampling))


async def test_a_json_document_goes_on_where_it_was(fresh: Engines) -> None:
    prefill, decode, alone = fresh
    vocab = Vocab(find_model(DEFAULT_MODEL))
    prompt = vocab.encode("<|im_start|>user\nA city as JSON.<|im_end|>\n<|im_start|>assistant\n")
    sampling = {"json_schema": SCHEMA, "temperature": 0.0, "max_tokens": 60}
    answer = await hand_over(prefill, decode, prompt, **sampling)
    assert_equal(answer.whole, await collect(alone.engine, prompt, **sampling))
    text = b"".join(map(vocab.token_bytes, answer.whole.token_ids)).decode()
    vocab.close()
    assert set(json.loads(text)) == {"city"}
    assert answer.whole.finish_reason == "stop"


async def test_an_answer_of_one_token_is_not_handed_over(fresh: Engines) -> None:
    prefill, _, alone = fresh
    prompt = a_prompt(14, 20)
    one = {**GREEDY, "max_tokens": 1}
    item = await compute(prefill, prompt, **one)
    assert (item.finish_reason, item.kv) == ("length", None)
    assert_equal(Result([item]), await collect(alone.engine, prompt, **one))


async def test_a_first_token_that_ends_the_answer_is_not_handed_over(fresh: Engines) -> None:
    prefill, _, alone = fresh
    prompt = a_prompt(15, 20)
    (first,) = (await collect(alone.engine, prompt, **{**GREEDY, "max_tokens": 1})).token_ids
    item = await compute(prefill, prompt, **{**GREEDY, "stop_token_ids": [first]})
    assert (item.token_ids, item.finish_reason, item.kv) == ([], "stop", None)


async def test_an_answer_that_was_begun_is_handed_over(fresh: Engines) -> None:
    """A migrated request, too, may be computed elsewhere."""
    prefill, decode, alone = fresh
    prompt = a_prompt(16, 40)
    sampling = {**GREEDY, "max_tokens": 8}
    local = await collect(alone.engine, prompt, **sampling)
    begun = local.token_ids[:3]
    request = GenerateRequest([*prompt, *begun], SamplingParams(**sampling), 3, prefill_only=True)
    (first,) = (await prefill.run(request)).items
    assert first.kv is not None
    assert first.kv.tokens == 43
    tokens = [*prompt, *begun, *first.token_ids]
    rest = await decode.run(GenerateRequest(tokens, SamplingParams(**sampling), 4, kv=first.kv))
    assert [*begun, *first.token_ids, *rest.token_ids] == local.token_ids


async def test_nothing_leaks_when_requests_are_stopped_at_random_moments() -> None:
    """A short run of `handover_soak`, which checks that."""
    assert "handed over: length" in await soak(60, seed=1)
