"""What a schema is before SGLang or vLLM gets it."""

import json
import subprocess
import sys
from typing import Any

from common.engines.llguidance_schema import MAX_DEPTH, depth, engine_schema
from common.protocol import PipelineError

import pytest

# llguidance as an engine uses it, in a thread with the usual stack.
COMPILE = """
import sys, threading
from llguidance import LLMatcher, LLTokenizer
text = sys.stdin.read()
def compile():
    matcher = LLMatcher(LLTokenizer("byte"), LLMatcher.grammar_from_json_schema(text))
    matcher.compute_bitmask()
    print(matcher.is_error(), matcher.get_error())
threading.stack_size(8 * 1024 * 1024)
thread = threading.Thread(target=compile)
thread.start()
thread.join()
"""


def wrapped(kind: str, schema: Any) -> Any:
    if kind == "object":
        return {"type": "object", "properties": {"x": schema}, "required": ["x"]}
    if kind == "array":
        return {"type": "array", "items": schema, "minItems": 1}
    return {kind: [schema]}


def chain(kind: str, length: int) -> dict[str, Any]:
    """A definition within each definition."""
    parts = {f"p{n}": wrapped(kind, {"$ref": f"#/$defs/p{n + 1}"}) for n in range(length)}
    return {"$ref": "#/$defs/p0", "$defs": {**parts, f"p{length}": {"const": 1}}}


@pytest.mark.parametrize("kind", ["object", "array", "anyOf", "allOf", "oneOf"])
def test_the_deepest_schema_is_not_too_deep_for_an_engine(kind: str) -> None:
    """llguidance would take the whole engine with it."""
    length = next(n for n in range(MAX_DEPTH) if depth(chain(kind, n + 1)) > MAX_DEPTH)
    assert length > 50
    text = engine_schema(json.dumps(chain(kind, length)))
    result = subprocess.run(
        [sys.executable, "-c", COMPILE], input=text, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (0, "False \n")
    with pytest.raises(PipelineError, match=f"nests more than {MAX_DEPTH} deep") as error:
        engine_schema(json.dumps(chain(kind, length + 1)))
    assert error.value.info.kind == "invalid_request"
    assert error.value.info.param == "json_schema"


def test_a_document_that_is_nested_too_deep() -> None:
    with pytest.raises(PipelineError, match=r"nests more|not valid JSON"):
        engine_schema('{"items":' * 900 + "{}" + "}" * 900)
    with pytest.raises(PipelineError, match=r"nests more|not valid JSON"):
        engine_schema('{"items":' * 5000 + "{}" + "}" * 5000)


def test_depth() -> None:
    assert depth({}) == 1
    assert depth({"const": 1, "x": [{}]}) == 3
    assert depth({"$ref": "nowhere"}) == 1
    pair = {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}], "$defs": {"a": {"x": {}}}}
    assert depth(pair) == 5


def test_depth_of_what_contains_itself() -> None:
    """It is bounded whatever the order in which references are followed."""
    node = {"type": "object", "properties": {"child": {"$ref": "#"}}}
    assert depth(node) == 2 * depth({"properties": {"child": {}}})
    ring = {f"p{n}": {"items": {"$ref": f"#/$defs/p{(n + 1) % 300}"}} for n in range(300)}
    assert depth({"$ref": "#/$defs/p0", "$defs": ring}) > 600


def test_a_schema_says_what_the_json_looks_like() -> None:
    given = {"type": "object", "properties": {"a": {"const": 1}}}
    made = json.loads(engine_schema(json.dumps(given)))
    assert made.pop("x-guidance")["whitespace_flexible"] is False
    assert made == given
    assert engine_schema("true") == "true"


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ('{"type": ', "not valid JSON"),
        ('{"minimum": -9223372036854775808}', "minimum is"),
        (json.dumps({"title": "x" * 70_000}), "bytes"),
    ],
)
def test_what_would_harm_an_engine_is_refused(schema: str, message: str) -> None:
    with pytest.raises(PipelineError, match=message) as error:
        engine_schema(schema)
    assert error.value.info.param == "json_schema"
