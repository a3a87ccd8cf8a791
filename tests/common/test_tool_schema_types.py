"""Numbers as a grammar is asked for them: none that the tool's own schema does not allow."""

import json
from typing import Any

from common.tool_schema_types import bounded_number

import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer

TOKENIZER = LLTokenizer("byte")
NUMBERS = ("0", "-0", "0.0", "0.1", "0.25", "0.5", "-7", "-7.0", "-7.5", "-7.7", "-8", "1", "2.5")


def taken(schema: dict[str, Any]) -> set[str]:
    """Which of `NUMBERS` the grammar of a schema takes."""
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
    matchers = {number: LLMatcher(TOKENIZER, grammar, log_level=0) for number in NUMBERS}
    return {
        number
        for number, matcher in matchers.items()
        if matcher.try_consume_tokens(list(number.encode())) == len(number)
        and matcher.is_accepting()
    }


@pytest.mark.parametrize(
    ("own", "some"),
    [
        ({"exclusiveMinimum": 0, "exclusiveMaximum": 0.5}, {"0.1", "0.25"}),
        ({"exclusiveMinimum": 0, "maximum": 0.5}, {"0.1", "0.5"}),
        ({"exclusiveMinimum": 0, "maximum": 0.5, "multipleOf": 0.25}, {"0.25"}),
        ({"exclusiveMinimum": -7.7, "exclusiveMaximum": -7}, {"-7.5"}),
        ({"exclusiveMinimum": 0, "minimum": 0.25, "maximum": 1}, {"0.25", "1"}),
        ({"exclusiveMaximum": 0}, {"-7", "-7.5"}),
        ({"exclusiveMinimum": -(2**53 - 1), "maximum": 1}, {"-8", "0", "1"}),
    ],
)
def test_an_exclusive_bound_is_no_number_of_the_range(own: dict[str, Any], some: set[str]) -> None:
    schema = {"type": "number", **bounded_number(own, integers=False)}
    numbers = taken(schema)
    assert some <= numbers
    for number in numbers:
        jsonschema.Draft202012Validator(own).validate(json.loads(number))
