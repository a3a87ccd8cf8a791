"""Every sampling parameter has its effect, or is refused by name."""

import json
from collections import Counter
from typing import Any

from common.engines.base import Engine
from common.engines.llama_capi import Vocab
from tests.contract.backends import Backend
from tests.contract.requests import CAPITAL, COUNT, ask, refused

import pytest

pytestmark = pytest.mark.asyncio(loop_scope="session")

CITY = json.dumps(
    {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}, "big": {"type": "boolean"}},
        "required": ["city", "big"],
        "additionalProperties": False,
    }
)


async def test_a_seed_gives_the_same_output_again(backend: Backend, engine: Engine) -> None:
    if "seed" in backend.refuses:
        await refused(engine, COUNT, "seed", seed=7, temperature=1.0)
        return
    outputs = [
        (await ask(engine, COUNT, max_tokens=12, seed=seed, temperature=1.5)).token_ids
        for seed in (7, 7, 8, 9)
    ]
    assert outputs[0] == outputs[1]
    if backend.has_model:
        assert len({tuple(output) for output in outputs}) >= 2


async def test_no_seed_no_repetition(backend: Backend, engine: Engine) -> None:
    outputs = [
        (await ask(engine, COUNT, max_tokens=12, temperature=2.0)).token_ids for _ in range(3)
    ]
    if backend.has_model:
        assert len({tuple(output) for output in outputs}) >= 2


async def test_a_seed_goes_on_where_another_engine_was(backend: Backend, engine: Engine) -> None:
    if "seed" in backend.refuses:
        await refused(engine, [*COUNT, 1], "seed", seed=7, temperature=1.0, generated=1)
        return
    sampling: dict[str, Any] = {
        "max_tokens": 10,
        "seed": 11,
        "temperature": 1.5,
        "ignore_eos": True,
    }
    if not backend.continues_seeds:
        await refused(engine, [*COUNT, 1], "generated", generated=1, **sampling)
        return
    whole = (await ask(engine, COUNT, **sampling)).token_ids
    rest = (await ask(engine, [*COUNT, *whole[:5]], 5, **sampling)).token_ids
    assert whole[:5] + rest == whole


async def test_only_the_likeliest_token_is_left(engine: Engine) -> None:
    """Each of the three leaves nothing to chance, however hot."""
    greedy = (await ask(engine, COUNT, max_tokens=6)).token_ids
    for name, value in (("top_k", 1), ("top_p", 0.01), ("min_p", 1.0)):
        options: dict[str, Any] = {name: value, "temperature": 2.0}
        assert (await ask(engine, COUNT, max_tokens=6, **options)).token_ids == greedy, name


async def test_logprobs(backend: Backend, engine: Engine) -> None:
    if "logprobs" in backend.refuses:
        await refused(engine, COUNT, "logprobs", logprobs=0)
        return
    for count in (0, 1, 3):
        result = await ask(engine, COUNT, max_tokens=5, logprobs=count, ignore_eos=True)
        assert len(result.logprobs) == len(result.token_ids) == 5
        for token, entry in zip(result.token_ids, result.logprobs, strict=True):
            values = [value for _, value in entry.top]
            assert len(values) == count
            assert values == sorted(values, reverse=True)
            assert entry.logprob <= 0
            if entry.top:
                assert entry.top[0][0] == token
                assert entry.top[0][1] == pytest.approx(entry.logprob)


async def test_logprobs_are_the_models(backend: Backend, engine: Engine) -> None:
    """They do not depend on how a token is chosen, and a stop id has none."""
    if "logprobs" in backend.refuses:
        await refused(engine, COUNT, "logprobs", logprobs=2, temperature=2.0)
        return
    (cold,) = (await ask(engine, COUNT, max_tokens=1, logprobs=3)).logprobs
    (hot,) = (await ask(engine, COUNT, max_tokens=1, logprobs=3, temperature=2.0)).logprobs
    assert [token for token, _ in hot.top] == [token for token, _ in cold.top]
    assert [value for _, value in hot.top] == pytest.approx(
        [value for _, value in cold.top], abs=0.05
    )
    tokens = (await ask(engine, COUNT, max_tokens=3)).token_ids
    stopped = await ask(engine, COUNT, max_tokens=3, stop_token_ids=[tokens[1]], logprobs=1)
    assert len(stopped.logprobs) == len(stopped.token_ids) == 1


async def test_logit_bias(backend: Backend, engine: Engine) -> None:
    if "logit_bias" in backend.refuses:
        await refused(engine, COUNT, "logit_bias", logit_bias=[(5, 1.0)])
        return
    (first,) = (await ask(engine, COUNT, max_tokens=1)).token_ids
    without = await ask(engine, COUNT, max_tokens=1, logit_bias=[(first, -100.0)])
    assert without.token_ids != [first]
    wanted = await ask(engine, COUNT, max_tokens=2, logit_bias=[(900, 100.0)], ignore_eos=True)
    assert wanted.token_ids == [900, 900]


async def test_penalties(backend: Backend, engine: Engine) -> None:
    """The model repeats itself less, also what another engine generated."""
    options: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True}
    each: list[dict[str, Any]] = [{"frequency_penalty": 2.0}, {"presence_penalty": 2.0}]
    for penalties in each:
        penalised = (await ask(engine, COUNT, **options, **penalties)).token_ids
        if backend.has_model:
            plain = (await ask(engine, COUNT, **options)).token_ids
            (_, often), *_ = Counter(plain).most_common(1)
            (_, penalised_often), *_ = Counter(penalised).most_common(1)
            assert penalised_often < often
    began = [900] * 6
    bias = [] if "logit_bias" in backend.refuses else [(900, 5.0)]
    request: dict[str, Any] = {"max_tokens": 7, "logit_bias": bias, "frequency_penalty": 2.0}
    continued = await ask(engine, [*COUNT, *began], 6, ignore_eos=True, **request)
    assert len(continued.token_ids) == 1
    if backend.has_model:
        assert continued.token_ids != [900]


async def test_a_json_schema(backend: Backend, engine: Engine, vocab: Vocab) -> None:
    if "json_schema" in backend.refuses:
        await refused(engine, COUNT, "json_schema", json_schema=CITY)
        return
    result = await ask(engine, CAPITAL, max_tokens=60, json_schema=CITY)
    assert result.finish_reason == "stop"
    document = json.loads(b"".join(vocab.token_bytes(token) for token in result.token_ids))
    assert document["city"] in ("Paris", "Rome")
    assert isinstance(document["big"], bool)


async def test_a_json_document_that_another_engine_began(
    backend: Backend, engine: Engine, vocab: Vocab
) -> None:
    if "json_schema" in backend.refuses:
        await refused(engine, [*CAPITAL, 107], "json_schema", generated=1, json_schema=CITY)
        return
    if not backend.continues_schemas:
        await refused(engine, [*CAPITAL, 107], "generated", generated=1, json_schema=CITY)
        return
    whole = await ask(engine, CAPITAL, max_tokens=60, json_schema=CITY)
    began = whole.token_ids[:4]
    rest = await ask(engine, [*CAPITAL, *began], 4, max_tokens=60, json_schema=CITY)
    tokens = began + rest.token_ids
    json.loads(b"".join(vocab.token_bytes(token) for token in tokens))


@pytest.mark.parametrize("schema", ['{"type": "nonsense"}', '{"type": '])
async def test_a_bad_json_schema(engine: Engine, schema: str) -> None:
    """Whether the engine has schemas or not: the field is named, and the engine goes on."""
    message = await refused(engine, COUNT, "json_schema", json_schema=schema, max_tokens=5)
    assert message
    assert (await ask(engine, COUNT, max_tokens=2, ignore_eos=True)).finish_reason == "length"
