"""The conformance table: it counts what must be counted, and shows no figures that mislead."""

from benchmarks.report import GuardError
from benchmarks.tool_calls import Answer, forced_valid_share, problem_of, requests_of, row, table
from benchmarks.tool_schemas import tools_of
from common.protocol_tools import FunctionTool, ToolCall

import jsonschema
import pytest

CALL = ToolCall("call_1", "f", '{"a": 1}')
TOOL = FunctionTool("f", "", {"type": "object", "properties": {"a": {"type": "integer"}}})
GOOD = Answer([CALL], None, 1.0, 10)
BAD = Answer([], "0 calls, finish reason length", 2.0, 20)
NOTHING = Answer([], None, 1.0, 10)
ALL = {
    "named": [GOOD, GOOD],
    "required": [GOOD],
    "parallel": [GOOD],
    "auto": [NOTHING],
    "none": [NOTHING],
}


def test_the_schemas_are_valid_different_and_the_same_for_a_seed() -> None:
    tools = tools_of(1, 240)
    assert len({tool.name for tool in tools}) == 240
    assert tools_of(1, 240) == tools
    assert tools_of(2, 240) != tools
    for tool in tools:
        jsonschema.Draft202012Validator.check_schema(tool.parameters or {})


def test_every_tool_is_asked_for_in_every_way() -> None:
    tools = tools_of(1, 7)
    for choice, requests in requests_of(tools, 1).items():
        assert [tool for request in requests for tool in request.tools] == tools, choice


def test_a_call_is_held_to_its_tools_own_schema() -> None:
    assert problem_of(CALL, [TOOL]) is None
    for name, arguments in (("g", "{}"), ("f", '{"a": "1"}'), ("f", '{"a": ')):
        assert problem_of(ToolCall("call_1", name, arguments), [TOOL]) is not None


def test_an_answer_without_its_call_counts_as_invalid() -> None:
    assert forced_valid_share(ALL) == 1.0
    assert forced_valid_share({**ALL, "required": [BAD]}) == 0.75
    counted = row("required", [GOOD, BAD])
    assert (counted["valid_share"], counted["calls"], counted["answers"]) == (0.5, 1, 2)
    assert table([counted]).count("| required |") == 1


def test_a_call_where_none_may_be_gives_no_figures() -> None:
    with pytest.raises(GuardError, match="there must be none"):
        forced_valid_share({**ALL, "none": [GOOD]})
