"""Answers that must match a JSON schema, by the real model."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

from common.engines.grammar import GrammarCompiler
from common.engines.json_schema import check_schema_size
from common.engines.llama_capi import Vocab
from common.engines.llamacpp import LlamaCppEngine, LlamaCppSettings
from common.model_files import DEFAULT_MODEL, find_model
from common.protocol import GenerateRequest, PipelineError, SamplingParams
from tests.common.engines.engine_helpers import ONE_THREAD, FakeContext, collect

import jsonschema_rs
import pytest
import pytest_asyncio

pytestmark = pytest.mark.asyncio(loop_scope="module")


def an_object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


WORD = {"type": "string", "maxLength": 12}
SCHEMAS: dict[str, dict[str, Any]] = {
    "object": an_object(city=WORD, population={"type": "integer", "minimum": 0, "maximum": 10**8}),
    "nested": an_object(person=an_object(name=WORD, home=an_object(street=WORD))),
    "array": {"type": "array", "items": WORD, "minItems": 2, "maxItems": 3},
    "array of objects": {
        "type": "array",
        "items": an_object(x={"type": "integer", "minimum": -5, "maximum": 5}),
        "minItems": 1,
        "maxItems": 2,
    },
    "enum": {"enum": ["red", "green", "blue", 7, None]},
    "const": an_object(kind={"const": 'exactly "this" → é\n'}),
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "number": {"type": "number", "minimum": 0, "exclusiveMaximum": 1000, "multipleOf": 0.5},
    "any of": {"anyOf": [an_object(a=WORD), an_object(b={"type": "boolean"})]},
    "pattern": an_object(date={"type": "string", "pattern": "^20[0-9]{2}-(0[1-9]|1[0-2])$"}),
    "optional": {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    },
    "reference": {
        "$defs": {"colour": {"enum": ["red", "blue"]}},
        **an_object(first={"$ref": "#/$defs/colour"}, second={"$ref": "#/$defs/colour"}),
    },
    "prefix items": {
        "type": "array",
        "prefixItems": [WORD, {"type": "integer", "minimum": 0, "maximum": 99}],
        "items": False,
        "minItems": 2,
    },
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[LlamaCppEngine]:
    engine = await LlamaCppEngine.start(
        LlamaCppSettings(cache_tokens=2048, max_sequences=32, **ONE_THREAD)
    )
    yield engine
    await engine.close()


@pytest.fixture(scope="module")
def vocab() -> Iterator[Vocab]:
    vocab = Vocab(find_model(DEFAULT_MODEL))
    yield vocab
    vocab.close()


@pytest.mark.parametrize("name", SCHEMAS)
async def test_answers_parse_and_match_the_schema(
    engine: LlamaCppEngine, vocab: Vocab, name: str
) -> None:
    schema = SCHEMAS[name]
    prompt = vocab.encode("<|im_start|>user\nAnswer in JSON.<|im_end|>\n<|im_start|>assistant\n")
    for temperature, seed in ((0.0, None), (1.2, 1)):
        result = await collect(
            engine,
            prompt,
            json_schema=json.dumps(schema),
            temperature=temperature,
            seed=seed,
            max_tokens=150,
        )
        answer = b"".join(map(vocab.token_bytes, result.token_ids)).decode()
        assert result.finish_reason == "stop", answer
        jsonschema_rs.validate(schema, json.loads(answer))


async def test_a_truncated_answer_says_length(engine: LlamaCppEngine) -> None:
    schema = json.dumps(SCHEMAS["nested"])
    result = await collect(engine, [1000], json_schema=schema, max_tokens=2)
    assert result.finish_reason == "length"


async def test_constrained_and_free_requests_share_a_batch(
    engine: LlamaCppEngine, vocab: Vocab
) -> None:
    schema = json.dumps(SCHEMAS["boolean"])
    constrained = GenerateRequest([1000], SamplingParams(json_schema=schema, temperature=0))
    free = engine.generate(
        GenerateRequest([1000] * 4, SamplingParams(max_tokens=40, ignore_eos=True)), FakeContext()
    )
    first = await anext(free)
    items = [item async for item in engine.generate(constrained, FakeContext())]
    answer = [token for item in items for token in item.token_ids]
    assert b"".join(map(vocab.token_bytes, answer)) in (b"true", b"false")
    rest = [token async for item in free for token in item.token_ids]
    assert len(first.token_ids) + len(rest) == 40


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{not json", "JSON"),
        ('{"type": "strnig"}', "strnig"),
        ('{"type": "object", "properties": {"a": {"$ref": "#/$defs/none"}}}', "none"),
        ('{"type": "string", "pattern": "("}', "pattern|regex|parse"),
        ('{"type": "integer", "minimum": 3, "maximum": 2}', "minimum|maximum|unsatisfiable"),
        ('{"$ref": "#"}', "no JSON document matches"),
        (
            '{"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, '
            '"$ref": "#/$defs/a"}',
            "no JSON document matches",
        ),
    ],
)
async def test_a_schema_that_cannot_be_used_is_refused_by_name(
    engine: LlamaCppEngine, schema: str, message: str
) -> None:
    request = GenerateRequest([1], SamplingParams(json_schema=schema))
    with pytest.raises(PipelineError, match=message) as caught:
        await anext(engine.generate(request, FakeContext()))
    assert (caught.value.info.kind, caught.value.info.param) == (
        "invalid_request",
        "json_schema",
    )


@pytest.mark.parametrize("name", ["min_tokens", "ignore_eos"])
async def test_what_contradicts_a_schema_is_refused(engine: LlamaCppEngine, name: str) -> None:
    sampling = SamplingParams(json_schema="{}", **{name: True})  # type: ignore[arg-type]
    with pytest.raises(PipelineError, match=name):
        engine.generate(GenerateRequest([1], sampling), FakeContext())


async def test_a_schema_that_only_fails_while_it_is_followed_is_the_callers_fault(
    engine: LlamaCppEngine,
) -> None:
    """The compiled grammar (here about 100 kB) is no part of the message."""
    pattern = "(a*b*)*" * 6000
    with pytest.raises(PipelineError, match="too many expressions") as caught:
        await collect(engine, [1], json_schema=json.dumps({"type": "string", "pattern": pattern}))
    assert (caught.value.info.kind, caught.value.info.param) == ("invalid_request", "json_schema")
    assert len(caught.value.info.message) < 250


async def test_an_impossible_part_of_a_schema_is_never_answered_with_broken_json(
    engine: LlamaCppEngine,
) -> None:
    schema = an_object(a={"$ref": "#/$defs/x"}) | {"$defs": {"x": {"$ref": "#/$defs/x"}}}
    with pytest.raises(PipelineError, match="no JSON document matches") as caught:
        await collect(engine, [1], json_schema=json.dumps(schema), max_tokens=30)
    assert caught.value.info.kind == "invalid_request"


async def test_a_chain_of_references_as_long_as_the_size_allows_does_not_overflow_the_stack() -> (
    None
):
    levels = '{"items":' * 100 + '{"$ref":"#/$defs/%d"}' + "}" * 100
    links = ",".join(f'"{i}":{levels % (i + 1)}' for i in range(60))
    schema = f'{{"$defs":{{{links},"60":{{}}}},"$ref":"#/$defs/0"}}'
    check_schema_size(schema)
    compiler = GrammarCompiler(DEFAULT_MODEL)
    matcher = await compiler.compile_unless(FakeContext().async_killed_or_stopped(), schema)
    assert matcher is not None
    assert not matcher.is_error()
    await asyncio.to_thread(compiler.close)


async def test_control_tokens_cannot_stand_in_for_their_text(vocab: Vocab) -> None:
    """The token <|im_start|> is no way to write a string that contains this text."""
    compiler = GrammarCompiler(DEFAULT_MODEL)
    matcher = compiler.compile('{"const": "<|im_start|>"}')
    text = vocab.encode('"<|im_start|>"', special=False)
    assert matcher.validate_tokens(text) == len(text)
    assert matcher.validate_tokens(vocab.encode('"<|im_start|>"', special=True)) <= 1
    compiler.close()
