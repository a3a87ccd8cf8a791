"""Requests for responses: what an agent gets of them, what is refused and how it is named."""

import json
from typing import Any

from common.openai import client_error
from common.openai_docs import request_body_docs
from common.openai_fields import parse
from common.openai_response_agent import asked_of, to_agent_request
from common.openai_response_requests import ResponseRequest
from common.openai_response_unsupported import PARAMETERS
from common.protocol import ErrorInfo, PipelineError, SamplingParams, to_wire
from common.protocol_agent import (
    AgentRequest,
    Budget,
    FunctionCallItem,
    FunctionOutputItem,
    Item,
    MessageItem,
    ToolRunItem,
    ToolSet,
)
from common.protocol_routing import RoutingHints
from common.protocol_tools import FunctionTool, ToolChoice

import jsonschema_rs
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses.response_create_params import ResponseCreateParamsBase

FUNCTION = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
MCP = {"type": "mcp", "server_label": "builtin", "require_approval": "never"}
WEATHER = {**MCP, "server_label": "weather"}
CODE = {"type": "code_interpreter", "container": {"type": "auto"}}
SEARCH = {"type": "file_search", "vector_store_ids": ["documents"]}


def request(**parameters: Any) -> ResponseRequest:
    body = {"model": "m", "input": "hi", **parameters}
    return parse(ResponseRequest, json.dumps(body).encode())


def sent(**parameters: Any) -> AgentRequest:
    parsed = request(**parameters)
    return to_agent_request(parsed, "resp_1", asked_of(parsed, 1), RoutingHints())


def refusal(**parameters: Any) -> ErrorInfo:
    with pytest.raises(PipelineError) as caught:
        request(**parameters)
    assert caught.value.info.kind == "invalid_request"
    return caught.value.info


def items(*given: dict[str, Any]) -> list[Item]:
    return sent(input=list(given)).input


def test_defaults() -> None:
    got = sent()
    assert got == AgentRequest(
        "m", "resp_1", [MessageItem("user", "hi")], document=got.document, sampling=SamplingParams()
    )
    assert got.document["created_at"] == 1


def test_null_means_the_default() -> None:
    fields = set(ResponseRequest.model_fields) - {"model", "input"}
    assert sent(**dict.fromkeys(fields | set(PARAMETERS))) == sent()


def test_every_parameter_of_the_client_is_known() -> None:
    known = {*ResponseRequest.model_fields, *PARAMETERS}
    assert set(ResponseCreateParamsBase.__annotations__) - known == set()


def test_what_the_agent_gets() -> None:
    got = sent(
        instructions="Be brief.",
        previous_response_id="resp_0",
        tools=[FUNCTION, MCP, CODE, SEARCH],
        tool_choice="required",
        parallel_tool_calls=False,
        max_output_tokens=9,
        max_tool_calls=8,
        temperature=0,
        top_p=0.5,
        text={"format": {"type": "json_schema", "name": "a", "schema": {"type": "null"}}},
        store=False,
        user="me",
        nvext={"max_steps": 3, "timeout_s": 2.5, "tool_plan": ["weather"]},
    )
    assert (got.instructions, got.previous_response_id) == ("Be brief.", "resp_0")
    assert got.functions == [FunctionTool("weather", parameters={"type": "object"})]
    assert got.toolsets == [
        ToolSet("builtin"),
        ToolSet("builtin", ["python"]),
        ToolSet("builtin", ["search_documents"]),
    ]
    assert got.tool_choice == ToolChoice("required")
    assert (got.parallel_tool_calls, got.store, got.user) == (False, False, "me")
    assert got.sampling == SamplingParams(temperature=0, top_p=0.5, json_schema='{"type":"null"}')
    assert got.budget == Budget(steps=3, tool_calls=8, seconds=2.5, output_tokens=9)
    assert got.plan == ["weather"]


@pytest.mark.parametrize("value", ["c-1", {"id": "c-1"}])
def test_a_conversation_is_an_id_or_has_one(value: Any) -> None:
    assert sent(conversation=value).conversation == "c-1"


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [
        ("auto", ToolChoice()),
        ("none", ToolChoice("none")),
        ({"type": "function", "name": "weather"}, ToolChoice("required", "weather")),
        (
            {"type": "mcp", "server_label": "builtin", "name": "x"},
            ToolChoice("required", "x", "builtin"),
        ),
        ({"type": "code_interpreter"}, ToolChoice("required", "python", "builtin")),
        ({"type": "file_search"}, ToolChoice("required", "search_documents", "builtin")),
    ],
)
def test_choices(choice: Any, wanted: ToolChoice) -> None:
    got = sent(tools=[FUNCTION, MCP, CODE, SEARCH], tool_choice=choice)
    assert got.tool_choice == wanted
    assert got.document["tool_choice"] == choice


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ([FUNCTION, CODE], "'weather' is no 'mcp' tool of 'tools'"),
        ([{**MCP, "server_label": "other"}], "'weather' is no 'mcp' tool of 'tools'"),
        ([{**WEATHER, "allowed_tools": ["g"]}], "'f' is none of the 'allowed_tools' of 'weather'"),
        ([WEATHER, {**FUNCTION, "name": "f"}], "'f' is one of 'tools', not of 'weather'"),
        ([WEATHER, {**MCP, "allowed_tools": ["f"]}], "'f' is of 'builtin', not of 'weather'"),
    ],
)
def test_a_tool_of_one_set_is_not_that_of_another(tools: list[Any], reason: str) -> None:
    choice = {"type": "mcp", "server_label": "weather", "name": "f"}
    info = refusal(tools=tools, tool_choice=choice)
    assert info.param == "tool_choice"
    assert reason in info.message


@pytest.mark.parametrize("allowed", [None, ["f", "g"]])
def test_a_tool_of_a_set_may_be_chosen(allowed: list[str] | None) -> None:
    choice = {"type": "mcp", "server_label": "weather", "name": "f"}
    tools = [FUNCTION, MCP, CODE, {**WEATHER, "allowed_tools": allowed}]
    assert sent(tools=tools, tool_choice=choice).tool_choice == ToolChoice(
        "required", "f", "weather"
    )


@pytest.mark.parametrize("allowed", [["a", "b"], {"tool_names": ["a", "b"]}])
def test_of_a_set_some_tools_may_be_allowed(allowed: Any) -> None:
    assert sent(tools=[{**MCP, "allowed_tools": allowed}]).toolsets == [
        ToolSet("builtin", ["a", "b"])
    ]


def test_items_that_a_response_had_can_be_sent_back() -> None:
    text = {"type": "output_text", "text": "a", "annotations": [], "logprobs": []}
    call = {"id": "fc_1", "call_id": "1", "name": "f", "arguments": "{}", "status": "completed"}
    run = {"id": "mcp_2", "server_label": "s", "name": "g", "arguments": "{}", "output": "o"}
    error = {"type": "mcp_tool_execution_error", "content": "no"}
    code = {
        "id": "ci_3",
        "code": "1",
        "container_id": "c",
        "outputs": [{"type": "logs", "logs": "1"}],
    }
    assert items(
        {"role": "developer", "content": "d"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "u"}]},
        {
            "type": "message",
            "role": "assistant",
            "id": "m",
            "status": "completed",
            "content": [text],
        },
        {"type": "function_call", **call, "parsed_arguments": {}},
        {"type": "function_call_output", "call_id": "1", "output": "r"},
        {"type": "mcp_call", **run, "error": None, "status": "completed"},
        {"type": "mcp_call", **run, "output": None, "error": error, "status": "failed"},
        {"type": "code_interpreter_call", **code, "status": "completed"},
        {"type": "file_search_call", "id": "fs_4", "queries": ["q"], "results": [{"text": "t"}]},
    ) == [
        MessageItem("system", "d"),
        MessageItem("user", "u"),
        MessageItem("assistant", "a"),
        FunctionCallItem("1", "f", "{}", step=1),
        FunctionOutputItem("1", "r"),
        ToolRunItem("2", "s", "g", "{}", "o", step=2),
        ToolRunItem("2", "s", "g", "{}", "", "no", step=3),
        ToolRunItem("3", "builtin", "python", '{"code": "1"}', "1", step=4),
        ToolRunItem("4", "builtin", "search_documents", '{"query": "q"}', "t", step=5),
    ]


def test_functions_that_were_called_at_once_are_of_one_step() -> None:
    def call(call_id: str) -> dict[str, Any]:
        return {"type": "function_call", "call_id": call_id, "name": "f", "arguments": "{}"}

    def output(call_id: str) -> dict[str, Any]:
        return {"type": "function_call_output", "call_id": call_id, "output": "r"}

    got = items(call("1"), call("2"), output("1"), output("2"), call("3"), output("3"))
    assert [item.step for item in got if isinstance(item, FunctionCallItem)] == [1, 1, 2]


@pytest.mark.parametrize(
    ("parameters", "param", "message"),
    [
        ({"input": []}, "input", "at least 1"),
        ({"input": 5}, "input", "list"),
        ({"input": [{"type": "reasoning"}]}, "input[0].type", "'function_call_output'"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "'developer'"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].type",
            "'input_text'",
        ),
        (
            {"input": [{"type": "function_call_output", "output": "x"}]},
            "input[0].call_id",
            "Missing",
        ),
        (
            {"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "{"}]},
            "input[0].arguments",
            "JSON",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'code_interpreter'"),
        ({"tools": [{**MCP, "server_url": "http://x"}]}, "tools[0].server_url", "not supported"),
        (
            {"tools": [{**MCP, "require_approval": "always"}]},
            "tools[0].require_approval",
            "'never'",
        ),
        (
            {"tools": [{"type": "mcp", "server_label": "builtin"}]},
            "tools[0].require_approval",
            "Missing",
        ),
        ({"tools": [MCP, MCP]}, "tools[1].server_label", "twice"),
        ({"tools": [MCP, FUNCTION, FUNCTION]}, "tools[2].name", "two tools"),
        ({"tools": [{**FUNCTION, "name": "a b"}]}, "tools[0].name", "pattern"),
        ({"tools": [{**SEARCH, "vector_store_ids": ["x"]}]}, "tools[0].vector_store_ids[0]", "doc"),
        ({"tools": [{**CODE, "container": "cntr_1"}]}, "tools[0].container", "object"),
        (
            {"tools": [{**CODE, "container": {"type": "auto", "file_ids": ["x"]}}]},
            "tools[0].container.file_ids",
            "not supported",
        ),
        ({"tool_choice": "required"}, "tool_choice", "none of 'tools'"),
        ({"tool_choice": "any"}, "tool_choice", "Unknown: 'any'"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.type", "'function'"),
        (
            {"tools": [FUNCTION], "tool_choice": {"type": "function", "name": "x"}},
            "tool_choice",
            "none of 'tools'",
        ),
        (
            {"tools": [MCP], "tool_choice": {"type": "mcp", "server_label": "builtin"}},
            "tool_choice.name",
            "Needed",
        ),
        ({"previous_response_id": "a.b"}, "previous_response_id", "letters"),
        ({"conversation": "*"}, "conversation.id", "letters"),
        ({"conversation": "a", "previous_response_id": "b"}, "conversation", "Not together"),
        ({"user": "a", "safety_identifier": "b"}, "safety_identifier", "Differs"),
        ({"truncation": "off"}, "truncation", "'auto'"),
        ({"include": ["message.output_text.logprobs"]}, "include[0]", "file_search_call.results"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.name", "Needed"),
        ({"text": {"format": {"type": "text", "name": "a"}}}, "text.format.name", "Only"),
        ({"text": {"verbosity": "high"}}, "text.verbosity", "not supported"),
        ({"metadata": {"a": 1}}, "metadata.a", "string"),
        ({"background": True}, "background", "Accepted without effect: null, false"),
        ({"max_tool_calls": 0}, "max_tool_calls", "1 to 256"),
        ({"nvext": {"max_steps": 65}}, "nvext.max_steps", "1 to 64"),
        ({"nvext": {"tool_plan": ["a b"]}}, "nvext.tool_plan[0]", "pattern"),
        ({"nvext": {"extra_fields": ["timing"]}}, "nvext.extra_fields[0]", "steps"),
        ({"messages": []}, "messages", "unknown"),
    ],
)
def test_what_is_wrong_is_refused_by_name(
    parameters: dict[str, Any], param: str, message: str
) -> None:
    info = refusal(**parameters)
    assert info.param == param
    assert message in info.message


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_other_parameters_are_refused_by_name(name: str) -> None:
    assert refusal(**{name: "x"}).param == name


def test_components_complaints_have_the_clients_names() -> None:
    def seen(param: str, **parameters: Any) -> str | None:
        return client_error(request(**parameters), ErrorInfo("invalid_request", "x", param)).param

    assert seen("token_ids") == "input"
    assert seen("tool_plan") == "nvext.tool_plan"
    assert seen("json_schema") == "tools"
    assert seen("json_schema", text={"format": {"type": "json_object"}}) == "text.format"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["type", "role", "content", "name", "format", "id"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(sorted(ResponseRequest.model_fields)), json_values))
def test_arbitrary_json_is_parsed_or_refused(parameters: dict[str, Any]) -> None:
    """Nothing but the one error type leaves the parser, and what it accepts can be sent on."""
    try:
        outcome = to_wire(sent(**parameters))
    except PipelineError as error:
        outcome = to_wire(error.info)
    assert msgspec.msgpack.encode(outcome)


def test_the_openapi_document_says_what_is_accepted() -> None:
    docs = request_body_docs(ResponseRequest)["requestBody"]
    schema = docs["content"]["application/json"]["schema"]
    assert "$ref" not in json.dumps(schema), "references would point outside the body's schema"
    body = {"model": "m", "input": "hi", "tools": [FUNCTION, MCP, CODE, SEARCH]}
    jsonschema_rs.validate(schema, body)
    jsonschema_rs.validate(schema, {**body, "input": [{"role": "user", "content": "hi"}]})
    with pytest.raises(jsonschema_rs.ValidationError):
        jsonschema_rs.validate(schema, {**body, "tools": ["weather"]})
