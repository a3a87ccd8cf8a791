"""Tools in chat requests: what is honoured, what is refused and how it is named."""

import json
from typing import Any

from common.openai import (
    CHAT_RESPONSES,
    ToolChatRequest,
    chat_response,
    client_error,
    request_body_docs,
    to_tool_process_request,
)
from common.openai_fields import parse
from common.openai_schemas import MAX_SCHEMA_BYTES
from common.openai_tools import MAX_TOOLS, MAX_TOOLS_BYTES
from common.openai_unsupported import TOOL_MESSAGE_MEMBERS, TOOL_PARAMETERS
from common.protocol import ChatMessage, ErrorInfo, PipelineError, TextOutput, Usage, to_wire
from common.protocol_agent import ToolProcessRequest
from common.protocol_tools import FunctionTool, ToolCall, ToolCallDelta, ToolChoice
from common.tool_grammar import LIMITS
from common.tool_schema import tightened

import jsonschema_rs
import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

USER = {"role": "user", "content": "Weather in Paris?"}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def tool(name: str = "weather", **members: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": CITY, **members}}


def call(call_id: str = "call_1", arguments: str = '{"city":"Paris"}') -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


def calling(*calls: dict[str, Any], **members: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(calls), **members}


def result(call_id: str = "call_1", **members: Any) -> dict[str, Any]:
    return {"role": "tool", "content": "18 degrees", "tool_call_id": call_id, **members}


def request(**parameters: Any) -> ToolChatRequest:
    body = {"model": "m", "messages": [USER], **parameters}
    return parse(ToolChatRequest, json.dumps(body).encode())


def sent(**parameters: Any) -> ToolProcessRequest:
    return to_tool_process_request(request(**parameters))


def refusal(**parameters: Any) -> ErrorInfo:
    with pytest.raises(PipelineError) as caught:
        request(**parameters)
    assert caught.value.info.kind == "invalid_request"
    return caught.value.info


def test_without_tools_it_is_a_chat() -> None:
    wanted = ToolProcessRequest("m", messages=[ChatMessage("user", "Weather in Paris?")])
    assert sent() == wanted
    assert sent(tools=[], tool_choice="auto", parallel_tool_calls=True) == wanted


def test_null_means_the_default() -> None:
    fields = set(ToolChatRequest.model_fields) - {"model", "messages"}
    assert sent(**dict.fromkeys(fields | set(TOOL_PARAMETERS))) == sent()


def test_a_function_reaches_the_processor() -> None:
    wanted = [FunctionTool("weather", "It.", CITY), FunctionTool("now")]
    bare = {"type": "function", "function": {"name": "now", "strict": True, "parameters": {}}}
    got = sent(tools=[tool(description="It."), bare])
    assert got.tools == wanted
    assert got.tool_choice == ToolChoice("auto")
    assert got.parallel_tool_calls is True
    assert sent(tools=[tool()], parallel_tool_calls=False).parallel_tool_calls is False


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [
        ("auto", ToolChoice()),
        ("none", ToolChoice("none")),
        ("required", ToolChoice("required")),
        ({"type": "function", "function": {"name": "b"}}, ToolChoice("required", "b")),
    ],
)
def test_choices(choice: Any, wanted: ToolChoice) -> None:
    got = sent(tools=[tool("a"), tool("b")], tool_choice=choice)
    assert (got.tool_choice, len(got.tools)) == (wanted, 2)


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_of_the_tools_only_the_allowed_ones_can_be_called(mode: str) -> None:
    allowed = {"mode": mode, "tools": [{"type": "function", "function": {"name": "b"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    got = sent(tools=[tool("a"), tool("b")], tool_choice=choice)
    assert got.tool_choice.mode == mode
    assert [one.name for one in got.tools] == ["b"]


def test_calls_and_their_results_reach_the_processor() -> None:
    calls = calling(call("1"), call("2"))
    parts = [{"type": "text", "text": "18"}, {"type": "text", "text": " degrees"}]
    got = sent(messages=[USER, calls, result("2"), result("1", content=parts), USER])
    assert got.messages is not None
    assert got.messages[1] == ChatMessage(
        "assistant",
        "",
        tool_calls=[ToolCall(i, "weather", '{"city":"Paris"}') for i in ("1", "2")],
    )
    assert got.messages[2:4] == [
        ChatMessage("tool", "18 degrees", tool_call_id="2"),
        ChatMessage("tool", "18 degrees", tool_call_id="1"),
    ]


def test_what_a_client_sends_back_is_understood() -> None:
    nulls = {"refusal": None, "annotations": None, "audio": None, "function_call": None}
    got = sent(messages=[USER, calling(call(), **nulls), result()])
    assert got.messages is not None
    assert got.messages[1].tool_calls


@pytest.mark.parametrize(
    ("parameters", "param", "message"),
    [
        ({"tools": [tool("two words")]}, "tools[0].function.name", "should match pattern"),
        ({"tools": [tool("x" * 65)]}, "tools[0].function.name", "should match pattern"),
        ({"tools": [{"type": "custom"}]}, "tools[0].type", "'function'"),
        ({"tools": [tool(), tool()]}, "tools[1].function.name", "the name of two tools"),
        ({"tools": [tool(f"t{i}") for i in range(MAX_TOOLS + 1)]}, "tools", "at most 128"),
        (
            {"tools": [tool(f"t{i}", description="x" * 8000) for i in range(10)]},
            "tools",
            f"over the limit of {MAX_TOOLS_BYTES} bytes",
        ),
        ({"tools": [tool(extra=1)]}, "tools[0].function.extra", "unknown"),
        ({"tools": [tool(strict="yes")]}, "tools[0].function.strict", "boolean"),
        ({"tools": [tool()], "tool_choice": "any"}, "tool_choice", "Unknown: 'any'"),
        ({"tool_choice": "required"}, "tool_choice", "Only with 'tools'"),
        (
            {"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice.function.name",
            "'x' is none of the tools",
        ),
        (
            {"tools": [tool()], "tool_choice": {"type": "custom", "custom": {"name": "x"}}},
            "tool_choice.type",
            "'allowed_tools'",
        ),
        (
            {"tools": [tool()], "tool_choice": {"type": "function"}},
            "tool_choice.function",
            "Needed with type 'function'",
        ),
        (
            {
                "tools": [tool()],
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {
                        "mode": "auto",
                        "tools": [{"type": "function", "function": {"name": "x"}}],
                    },
                },
            },
            "tool_choice.allowed_tools.tools[0].function.name",
            "'x' is none of the tools",
        ),
        ({"tools": [tool()], "parallel_tool_calls": 1}, "parallel_tool_calls", "boolean"),
    ],
)
def test_wrong_tools_are_refused_by_name(
    parameters: dict[str, Any], param: str, message: str
) -> None:
    info = refusal(**parameters)
    assert info.param == param
    assert message in info.message


@pytest.mark.parametrize(
    ("messages", "param", "message"),
    [
        ([result()], "messages[0].tool_call_id", "No call"),
        ([USER, calling(call()), USER], "messages[1].tool_calls[0]", "'call_1'"),
        ([USER, calling(call())], "messages[1].tool_calls[0]", "'call_1'"),
        ([calling(call("1"), call("2")), result("1")], "messages[0].tool_calls[1]", "'2'"),
        ([calling(call()), result("other")], "messages[1].tool_call_id", "No call"),
        ([calling(call()), result(), result()], "messages[2].tool_call_id", "No call"),
        ([calling(call(), call()), result()], "messages[0].tool_calls[1].id", "Two calls"),
        ([calling(call(arguments="{"))], "messages[0].tool_calls[0].function.arguments", "JSON"),
        ([calling(call(arguments="[]"))], "messages[0].tool_calls[0].function.arguments", "object"),
        (
            [calling(call(arguments="[" * 10_000))],
            "messages[0].tool_calls[0].function.arguments",
            "JSON",
        ),
        ([calling()], "messages[0].content", "Needed"),
        ([{"role": "user", "content": None}], "messages[0].content", "Needed"),
        ([{**USER, "tool_calls": [call()]}], "messages[0].tool_calls", "'assistant'"),
        ([{**USER, "tool_call_id": "1"}], "messages[0].tool_call_id", "'tool'"),
        ([result(tool_call_id=None)], "messages[0].tool_call_id", "Needed"),
        ([result(content=[{"type": "image_url"}])], "messages[0].content[0]", "text parts"),
    ],
)
def test_calls_and_results_must_fit_together(
    messages: list[dict[str, Any]], param: str, message: str
) -> None:
    info = refusal(messages=messages)
    assert info.param == param
    assert message in info.message


def nested(levels: int) -> dict[str, Any]:
    return {"type": "object", "not": nested(levels - 1)} if levels else {"type": "object"}


def doubling(levels: int) -> dict[str, Any]:
    """A small schema that stands for a large one."""
    definitions: dict[str, Any] = {"d0": {"type": "string"}}
    for level in range(levels):
        reference = {"$ref": f"#/$defs/d{level}"}
        definitions[f"d{level + 1}"] = {"type": "array", "prefixItems": [reference, reference]}
    return {"type": "object", "$defs": definitions, "not": {"$ref": f"#/$defs/d{levels}"}}


def chain(links: int) -> dict[str, Any]:
    definitions = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(links)}
    return {"type": "object", "$defs": {**definitions, f"d{links}": {}}}


def ladder() -> dict[str, Any]:
    """Neither references nor schemas are nested too deep, but both together."""
    definitions: dict[str, Any] = {}
    for level in range(30):
        step: dict[str, Any] = {"$ref": f"#/$defs/{level + 1}"}
        for _ in range(27):
            step = {"not": step}
        definitions[str(level)] = step
    return {"type": "object", "$defs": {**definitions, "30": {}}}


TREE = {"type": "object", "properties": {"child": {"$ref": "#/$defs/tree"}}}


@pytest.mark.parametrize(
    ("schema", "path", "message"),
    [
        ({"type": "string"}, ".type", 'must be "object", not "string"'),
        ({"properties": {}}, ".type", 'must be "object", not null'),
        ({"type": "object", "properties": {"a": {"type": "text"}}}, ".properties.a.type", '"text"'),
        ({"type": "object", "properties": 5}, ".properties", 'not of type "object"'),
        ({"type": "object", "title": "x" * MAX_SCHEMA_BYTES}, "", "over the limit"),
        (nested(40), "", "more than 32 levels"),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}}, "", "recursive: '#'"),
        ({"type": "object", "$defs": {"tree": TREE}}, "", "recursive: '#/$defs/tree'"),
        (doubling(14), "", "more than 2048 schemas"),
        (chain(40), "", "more than 32 levels"),
        (ladder(), "", "more than 32 levels"),
        ({"type": "object", "$ref": "https://example.org/x"}, "", "is not in the schema"),
        ({"type": "object", "$ref": "#/$defs/x"}, "", "names no schema"),
        ({"type": "object", "x": {"$ref": True}}, "", "'$ref' is text"),
        ({"type": "object", "$ref": "#/x", "x": {"properties": 5}}, "", "'#/x' names no schema"),
        ({"type": "object", "$id": "https://example.org/x"}, "", "'$id' is not supported"),
        ({"type": "object", "default": float("nan")}, "", "NaN"),
    ],
)
def test_schemas_that_are_refused(schema: dict[str, Any], path: str, message: str) -> None:
    info = refusal(tools=[tool(parameters=schema)])
    assert info.param == "tools[0].function.parameters" + path
    assert message in info.message


@pytest.mark.parametrize(
    "schema",
    [
        doubling(5),
        {"type": "object", "properties": {"$ref": {"type": "string"}, "default": {"type": "null"}}},
        {"type": "object", "properties": {"a": {"enum": [{"$ref": "#"}]}}},
        {
            "type": "object",
            "$defs": {"a": {}, "b": {"$ref": "#/$defs/a"}},
            "additionalProperties": True,
        },
    ],
)
def test_schemas_that_only_look_recursive(schema: dict[str, Any]) -> None:
    assert sent(tools=[tool(parameters=schema)]).tools[0].parameters == schema


@pytest.mark.parametrize("name", TOOL_PARAMETERS)
def test_the_other_parameters_are_still_refused(name: str) -> None:
    assert refusal(**{name: "x"}).param == name


@pytest.mark.parametrize("name", TOOL_MESSAGE_MEMBERS)
def test_the_other_members_of_messages_are_still_refused(name: str) -> None:
    assert refusal(messages=[{**USER, name: "x"}]).param == f"messages[0].{name}"


def test_an_engine_that_cannot_follow_a_schema_complains_about_the_tools() -> None:
    info = ErrorInfo("invalid_request", "json_schema has a pattern", "json_schema")
    forced = request(tools=[tool()], tool_choice="required")
    assert client_error(forced, info).param == "tools"
    formatted = request(response_format={"type": "json_object"})
    assert client_error(formatted, info).param == "response_format"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
keywords = st.sampled_from(
    [
        *("type", "properties", "$defs", "$ref", "items", "anyOf", "oneOf", "allOf", "enum"),
        *("const", "required", "maxLength", "additionalProperties", "prefixItems", "x"),
    ]
)
schema_like = st.recursive(
    st.sampled_from(["object", "string", "#/$defs/x", "#/x", "#/x/0", "#/x/x", True, 1, None]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keywords, inner, max_size=4),
    max_leaves=12,
)


@given(json_values, json_values)
def test_arbitrary_messages_and_choices_are_parsed_or_refused(messages: Any, choice: Any) -> None:
    """Nothing but the one error type leaves the parser, and what it accepts can be sent on."""
    for parameters in (
        {"tools": [tool()], "messages": messages},
        {"tools": [tool()], "tool_choice": choice},
    ):
        try:
            outcome = to_wire(sent(**parameters))
        except PipelineError as error:
            outcome = to_wire(error.info)
        assert msgspec.msgpack.encode(outcome)


schemas = st.dictionaries(keywords, schema_like, max_size=4)


@given(schemas | st.builds(lambda x: {"properties": {"a": {"$ref": "#/x"}}, "x": x}, schemas))
@example({"properties": {"a": {"$ref": "#/x"}}, "x": {"properties": 5}})
@example({"properties": {"a": {"$ref": "#/x"}}, "x": {"required": 5}})
def test_arbitrary_schemas_are_usable_or_refused(schema: Any) -> None:
    """Also behind references into keywords that nobody knows, where anything may be."""
    schema = {"type": "object", **schema}
    outcomes: list[Any] = []
    try:
        outcomes.append(to_wire(sent(tools=[tool(parameters=schema)])))
    except PipelineError as error:
        outcomes.append(to_wire(error.info))
    try:
        outcomes.append(tightened(FunctionTool("f", "", schema), LIMITS[0], {}, "t"))
    except PipelineError as error:
        outcomes.append(to_wire(error.info))
    assert all(map(msgspec.msgpack.encode, outcomes))


CALLS = [
    TextOutput(tool_calls=[ToolCallDelta(0, id="a", name="weather")]),
    TextOutput(tool_calls=[ToolCallDelta(0, '{"city":')]),
    TextOutput(tool_calls=[ToolCallDelta(0, '"x"}'), ToolCallDelta(1, "{}", "b", "now")], tokens=9),
    TextOutput(finish_reason="tool_calls", usage=Usage(9, 9)),
]


def test_a_whole_answer_has_the_calls() -> None:
    document = json.loads(chat_response("r", request(tools=[tool()]), CALLS))
    schema = CHAT_RESPONSES[200]["content"]["application/json"]["schema"]
    jsonschema_rs.validate({**schema, "unevaluatedProperties": False}, document)
    choice = document["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert choice["message"]["tool_calls"] == [
        {
            "id": "a",
            "type": "function",
            "function": {"name": "weather", "arguments": '{"city":"x"}'},
        },
        {"id": "b", "type": "function", "function": {"name": "now", "arguments": "{}"}},
    ]


def test_text_before_a_call_is_its_content() -> None:
    document = json.loads(chat_response("r", request(), [TextOutput("Let me see."), *CALLS]))
    assert document["choices"][0]["message"]["content"] == "Let me see."
    assert len(document["choices"][0]["message"]["tool_calls"]) == 2


def test_the_openapi_document_has_the_tools() -> None:
    docs = request_body_docs(ToolChatRequest)["requestBody"]
    schema = docs["content"]["application/json"]["schema"]
    assert "$ref" not in json.dumps(schema), "references would point outside the body's schema"
    body = {
        "model": "m",
        "messages": [USER, calling(call()), result()],
        "tools": [tool()],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    jsonschema_rs.validate(schema, body)
    with pytest.raises(jsonschema_rs.ValidationError):
        jsonschema_rs.validate(schema, {**body, "tools": ["weather"]})
