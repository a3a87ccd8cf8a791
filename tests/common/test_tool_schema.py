"""What a grammar of tightened schemas lets through matches the tools' own, and is finite."""

import functools
import json
import time
from random import Random
from typing import Any

from benchmarks.tool_schemas import tools_of
from common.engines.grammar import GrammarCompiler
from common.model_files import DEFAULT_MODEL
from common.protocol import PipelineError
from common.protocol_tools import FunctionTool
from common.tool_grammar import LIMITS, arguments_schema, calls_schema
from common.tool_schema import tightened
from common.tool_schema_any import Limits
from common.tool_schema_size import longest

import jsonschema_rs
import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


@functools.cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(DEFAULT_MODEL)


def some_document(schema: str, random: Random) -> Any:
    """One that the grammar allows, each token chosen by chance among those that it lets pass."""
    matcher = compiler().compile(schema)
    tokenizer = compiler()._load_tokenizer()
    tokens: list[int] = []
    while not matcher.is_stopped():
        mask = numpy.frombuffer(matcher.compute_bitmask(), numpy.uint8)
        allowed = numpy.unpackbits(mask, bitorder="little").nonzero()[0]
        token = int(allowed[random.randrange(len(allowed))])
        assert matcher.consume_token(token)
        tokens.append(token)
        assert len(tokens) < 100_000
    text = tokenizer.decode_bytes(tokens).decode()
    return json.loads(text.removesuffix("<|endoftext|>").removesuffix("<|im_end|>"))


def accepts(schema: str, document: Any) -> bool:
    """Whether the grammar lets the document pass, written as models do."""
    matcher = compiler().compile(schema)
    tokens = compiler()._load_tokenizer().tokenize_str(json.dumps(document))
    return (
        matcher.validate_tokens(tokens) == len(tokens)
        and matcher.consume_tokens(tokens)
        and matcher.is_accepting()
    )


def parameters(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def tool(schema: dict[str, Any] | None) -> FunctionTool:
    return FunctionTool("f", "", schema)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), tokens=st.sampled_from([100, 1000]))
def test_what_matches_the_tightened_schema_matches_the_tools_own(seed: int, tokens: int) -> None:
    [made] = tools_of(seed, 1)
    document = some_document(arguments_schema(made, tokens), Random(seed))
    jsonschema_rs.validate(made.parameters or {}, document)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), several=st.booleans())
def test_calls_of_several_tools_match_their_schemas(seed: int, several: bool) -> None:
    """Each tool's references go on pointing into its own schema."""
    made = {tool.name: tool for tool in tools_of(seed, 3)}
    schema = calls_schema(list(made.values()), "arguments", 500, most=3 if several else None)
    calls = some_document(schema, Random(seed))
    for call in calls if several else [calls]:
        jsonschema_rs.validate(made[call["name"]].parameters or {}, call["arguments"])
    assert not several or 1 <= len(calls) <= 3


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_every_schema_is_finite(seed: int) -> None:
    [made] = tools_of(seed, 1)
    definitions: dict[str, Any] = {}
    assert longest(tightened(made, LIMITS[-1], definitions, "t"), definitions) < 10**6


NODE = {
    "type": "object",
    "properties": {
        "value": {"type": "integer"},
        "next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]},
    },
    "required": ["value"],
}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (None, [{}], [{"a": 1}]),
        ({}, [{}], [{"a": 1}]),
        ({"type": "object", "properties": {}}, [{}], [{"a": 1}]),
        ({"type": "object"}, [{}, {"a": [{"b": None}], "b": 1}], [{"": 1}, {"a" * 33: 1}]),
        (parameters(s={"type": "string"}), [{"s": "x" * 128}], [{"s": "x" * 129}, {"s": 1}, {}]),
        (parameters(s={"type": "string", "maxLength": 500}), [{"s": "x" * 500}], []),
        (parameters(s={"type": "string", "pattern": "^[a-f]{300}$"}), [{"s": "a" * 300}], []),
        (parameters(s={"type": "string", "format": "phone"}), [{"s": "+49"}], []),
        (parameters(n={"type": "number"}), [{"n": -1.123456}], [{"n": 1.1234567}, {"n": 1e300}]),
        (parameters(n={"type": "integer"}), [{"n": 2**53 - 1}], [{"n": 2**53}]),
        (parameters(n={"type": "number", "exclusiveMinimum": 0, "maximum": 1e-3}),
         [{"n": 0.000987654}], [{"n": 1}]),
        (parameters(a={"type": "array", "items": {"type": "null"}}), [{"a": [None] * 6}],
         [{"a": [None] * 7}]),
        (parameters(a={"type": "array", "uniqueItems": True, "items": {"type": "integer"}}),
         [{"a": [1]}], [{"a": [1, 1]}, {"a": [1, 2]}]),
        (parameters(a={"$ref": "#/$defs/Node"}) | {"$defs": {"Node": NODE}},
         [{"a": {"value": 1, "next": {"value": 2, "next": {"value": 3}}}}], [{"a": {}}]),
        ({"type": "object", "properties": {"x": {"type": "integer"}, "again": {"$ref": "#"}}},
         [{"x": 1, "again": {"x": 2}}],
         [{"again": {"again": {"again": {"again": {"again": {}}}}}}]),
        ({"properties": {"a/b": {"type": "integer"}, "c": {"$ref": "#/properties/a~1b"}}},
         [{"c": 1}], [{"c": "x"}]),
        ({"$ref": "#/$defs/A", "$defs": {"A": parameters(x={"type": "boolean"})}},
         [{"x": True}], [{}, {"x": True, "y": 1}]),
        ({"allOf": [parameters(x={"type": "integer"}), parameters(y={"type": "integer"})]},
         [{"x": 1, "y": 2}], [{"x": 1}, {"x": 1, "y": 2, "z": 3}]),
        ({"properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
          "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
         [{"a": 1}, {"b": 1}], [{}, {"a": 1, "c": 1}]),
        (parameters(x={"enum": ["a", 1, {"k": []}]}), [{"x": {"k": []}}, {"x": 1}], [{"x": 2}]),
        (parameters(x={"type": "string", "default": "$ref"}), [{"x": "y"}], []),
        ({"type": "object", "properties": {"$ref": {"type": "string"}}}, [{"$ref": "x"}], []),
        ({"type": "object", "properties": {"a": {}, "b": {}}, "minProperties": 1}, [{"a": 1}],
         [{}]),
    ],
)  # fmt: skip
def test_bounds_by_example(schema: dict[str, Any] | None, good: list[Any], bad: list[Any]) -> None:
    definitions: dict[str, Any] = {}
    tight = tightened(tool(schema), Limits(128, 6), definitions, "t")
    text = json.dumps({**tight, "$defs": definitions})
    for document in good:
        assert accepts(text, document), document
        jsonschema_rs.validate(schema or {}, document)
    for document in bad:
        assert not accepts(text, document), document


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        (parameters(x={"not": {"type": "string"}}), "'not' is not supported"),
        (parameters(x={"$ref": "https://example.com/x"}), "nothing is fetched"),
        (parameters(x={"$ref": "#/$defs/none"}), "points to nothing"),
        (parameters(x={"type": "text"}), '"text" is not valid'),
        (parameters(x={"oneOf": [{"type": "string"}, {"minLength": 2}]}), "exclude each other"),
        (parameters(x={"type": "integer", "maximum": 10**30}), "maximum is"),
        ({"type": "object", "properties": []}, 'is not of type "object"'),
        (parameters(x={"$ref": "#/x"}) | {"x": {"properties": 5}}, "points to no schema"),
        (parameters(**{f"x{n}": {"type": "string"} for n in range(3000)}), "bytes"),
    ],
)
def test_what_no_grammar_can_do_is_refused_by_the_tools_name(
    schema: dict[str, Any], reason: str
) -> None:
    with pytest.raises(PipelineError, match="the tool 'f'") as caught:
        arguments_schema(tool(schema), 1000)
    assert caught.value.info.kind == "invalid_request"
    assert caught.value.info.param == "tools"
    assert reason in caught.value.info.message


def test_a_schema_nested_too_deep_is_refused() -> None:
    deep: dict[str, Any] = {"type": "integer"}
    for _ in range(2000):
        deep = {"items": deep}
    with pytest.raises(PipelineError, match="the tool 'f'"):
        arguments_schema(tool(parameters(x=deep)), 1000)


def test_a_schema_that_multiplies_is_refused() -> None:
    """Each of its definitions has all the others, at each depth again."""
    parts = {
        f"D{n}": {"properties": {f"p{m}": {"$ref": f"#/$defs/D{m}"} for m in range(40)}}
        for n in range(40)
    }
    with pytest.raises(PipelineError, match=r"more than|at most"):
        arguments_schema(tool(parameters(x={"$ref": "#/$defs/D0"}) | {"$defs": parts}), 1000)


def tagged(kind: str) -> dict[str, Any]:
    return parameters(kind={"const": kind}, text={"type": "string"})


@pytest.mark.parametrize(
    ("branches", "value"),
    [
        ([{"const": "a"}, {"const": 1}, {"enum": ["c", None]}], None),
        ([{"const": number} for number in range(800)], 799),
        ([{"type": "string"}, {"type": "null"}, {"type": ["integer", "boolean"]}, False], True),
        ([{"type": "string", "const": "a"}, {"type": "string", "const": "b"}, {"type": "null"}],
         "b"),
        ([{"$ref": "#/$defs/A"}, tagged("b"), {"type": "null"}], {"kind": "b", "text": ""}),
        ([parameters(a={"type": "string"}), parameters(a={"type": "integer"})], {"a": 1}),
    ],
)  # fmt: skip
def test_branches_exclude_each_other_by_type_or_constant(branches: list[Any], value: Any) -> None:
    schema = parameters(x={"oneOf": branches}) | {"$defs": {"A": tagged("a")}}
    text = arguments_schema(tool(schema), 1000)
    assert accepts(text, {"x": value})
    assert not accepts(text, {"x": "other"} if {"type": "string"} not in branches else {"x": []})


def test_any_of_some_and_one_of_others() -> None:
    numbers = {"anyOf": [{"const": 1}, {"const": 2}], "oneOf": [{"const": 2}, {"const": 3}]}
    text = arguments_schema(tool(parameters(x=numbers)), 1000)
    assert [number for number in range(5) if accepts(text, {"x": number})] == [2]


@pytest.mark.parametrize(
    "branches",
    [
        [{"const": "a"}, {"const": "b"}, {"enum": ["c", "a"]}],
        [{"const": [1]}, {"const": "b"}, {"const": [1.0]}],
        [{"const": "a"}, {"const": "b"}, {"type": "string"}],
        [{"$ref": "#/$defs/A"}, tagged("b"), tagged("a")],
        [{"type": "number"}, {"type": "null"}, {"type": "integer"}],
    ],
)
def test_branches_that_one_value_may_match_twice_are_refused(branches: list[Any]) -> None:
    schema = parameters(x={"oneOf": branches}) | {"$defs": {"A": tagged("a")}}
    with pytest.raises(PipelineError, match="exclude each other"):
        arguments_schema(tool(schema), 1000)


@pytest.mark.parametrize(
    ("branches", "refused"),
    [
        ([{"const": number} for number in range(800)], None),
        ([*({"const": number} for number in range(800)), {"const": 799}], "too many to compare"),
        ([{"$ref": f"#/$defs/{number}"} for number in range(300)], "too many to compare"),
    ],
)
def test_many_branches_are_seen_through_at_once(branches: list[Any], refused: str | None) -> None:
    """Each with each are up to 320 000 comparisons."""
    tags = {str(number): tagged(str(number)) for number in range(300)}
    used = tags if "$ref" in branches[0] else {}
    made = tool(parameters(x={"oneOf": branches}) | {"$defs": used})
    began = time.process_time()
    if refused is None:
        assert '{"const":799}' in arguments_schema(made, 1)  # goes through all the limits
    else:
        with pytest.raises(PipelineError, match=refused):
            arguments_schema(made, 1)
    assert time.process_time() - began < 1


def test_fewer_tokens_make_tighter_limits() -> None:
    made = tool(parameters(a={"type": "string"}, b={"type": "array"}))
    assert '"maxLength":2048' in arguments_schema(made, 10**7)
    assert '"maxLength":128' in arguments_schema(made, 10_000)
    assert '"maxLength":16}' in arguments_schema(made, 100)


def test_there_are_as_many_calls_as_fit() -> None:
    made = [tool(parameters(a={"type": "integer"}))]
    assert '"maxItems":4' in calls_schema(made, "arguments", 1000, most=4)
    assert '"maxItems":2' in calls_schema(made, "arguments", 140, most=4)
    assert '"maxItems":1' in calls_schema(made, "arguments", 10, most=4)
