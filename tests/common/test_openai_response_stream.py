"""An agent's run as a response: the events, their order and shapes, and what is stored of it."""

import json
from typing import Any

from common.openai_docs import Responses
from common.openai_fields import parse
from common.openai_response_agent import asked_of, to_agent_request
from common.openai_response_docs import RESPONSE_RESPONSES, STORED_RESPONSES
from common.openai_response_objects import Asked
from common.openai_response_output import stored_document
from common.openai_response_requests import ResponseRequest
from common.openai_response_stream import ResponseStream
from common.protocol import ErrorInfo, Usage
from common.protocol_agent import (
    AgentEvent,
    AgentRequest,
    CallDelta,
    FunctionCallItem,
    ItemDone,
    MessageItem,
    RunEnded,
    StepEnded,
    StepStarted,
    StoredResponse,
    TextDelta,
    ToolRunItem,
    ToolStarted,
)
from common.protocol_routing import RoutingHints

import httpx2
import jsonschema_rs
import msgspec
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

EVENT = TypeAdapter[Any](ResponseStreamEvent)
MCP = {"type": "mcp", "server_label": "builtin", "require_approval": "never"}
CODE = {"type": "code_interpreter", "container": {"type": "auto"}}
SEARCH = {"type": "file_search", "vector_store_ids": ["documents"]}
INCLUDE = ["code_interpreter_call.outputs", "file_search_call.results"]
USAGE = Usage(6, 8, 1)
ENDED = RunEnded("completed", USAGE, conversation="conv_1")


def task_of(**parameters: Any) -> AgentRequest:
    body = {"model": "m", "input": "hi", "tools": [MCP], **parameters}
    request = parse(ResponseRequest, json.dumps(body).encode())
    return to_agent_request(request, "resp_1", asked_of(request, 1), RoutingHints())


def stream(*, steps: bool = False, **parameters: Any) -> ResponseStream:
    task = task_of(**parameters)
    return ResponseStream(task, msgspec.convert(task.document, Asked), steps=steps)


def decoded(sent: bytes) -> list[dict[str, Any]]:
    """The events, each valid by the official client's models, and numbered."""
    documents: list[dict[str, Any]] = []
    for block in sent.decode().removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        document = json.loads(data.removeprefix("data: "))
        assert name == f"event: {document['type']}"
        assert document["sequence_number"] == len(documents)
        documents.append(document)
        if not document["type"].startswith("nvext."):
            EVENT.validate_json(data.removeprefix("data: "), strict=True)
    return documents


def events(run: list[AgentEvent], **parameters: Any) -> list[dict[str, Any]]:
    made = stream(**parameters)
    return decoded(b"".join(made.chunk(event) for event in run))


def kinds(documents: list[dict[str, Any]]) -> list[str]:
    return [document["type"].removeprefix("response.") for document in documents]


def tool_run(name: str, arguments: str, **members: Any) -> list[AgentEvent]:
    """The events of one call that the agent runs."""
    return [
        CallDelta(0, call_id="call_1", name=name, server="builtin"),
        CallDelta(0, arguments[:4]),
        CallDelta(0, arguments[4:]),
        ToolStarted(0),
        ItemDone(0, ToolRunItem("call_1", "builtin", name, arguments, **members)),
        ENDED,
    ]


TEXT: list[AgentEvent] = [
    StepStarted(1, 2),
    TextDelta(0, "Hel"),
    TextDelta(0, "lo"),
    StepEnded(1, USAGE, 1.5, 0, "stop"),
    ItemDone(0, MessageItem("assistant", "Hello")),
    ENDED,
]


def test_text() -> None:
    documents = events(TEXT)
    assert kinds(documents) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert documents[0]["response"]["status"] == "in_progress"
    assert documents[0]["response"]["output"] == []
    response = documents[-1]["response"]
    assert response["status"] == "completed"
    assert response["output"] == [documents[-2]["item"]]
    assert response["output"][0]["content"][0]["text"] == "Hello"
    assert response["usage"]["total_tokens"] == 14
    assert response["usage"]["input_tokens_details"]["cached_tokens"] == 1
    assert response["conversation"] == {"id": "conv_1"}


def test_a_call_of_a_tool_of_the_agent() -> None:
    documents = events(tool_run("calculator", '{"expression":"1+1"}', output="2"))
    assert kinds(documents)[2:] == [
        "output_item.added",
        "mcp_call.in_progress",
        "mcp_call_arguments.delta",
        "mcp_call_arguments.delta",
        "mcp_call_arguments.done",
        "mcp_call.completed",
        "output_item.done",
        "completed",
    ]
    item = documents[-2]["item"]
    assert (item["output"], item["error"], item["status"]) == ("2", None, "completed")
    assert item["arguments"] == '{"expression":"1+1"}'
    assert {e["item_id"] for e in documents if "item_id" in e} == {item["id"]}


def test_a_call_that_fails() -> None:
    documents = events(tool_run("calculator", '{"expression":"?"}', error="no number"))
    assert kinds(documents)[-3] == "mcp_call.failed"
    item = documents[-2]["item"]
    assert (item["output"], item["status"]) == (None, "failed")
    assert item["error"] == {"type": "mcp_tool_execution_error", "content": "no number"}


def test_a_call_that_is_not_run_has_its_arguments_all_the_same() -> None:
    run = tool_run("calculator", '{"expression":"1"}', error="not run")
    documents = events([event for event in run if not isinstance(event, ToolStarted)])
    assert "mcp_call_arguments.done" in kinds(documents)


@pytest.mark.parametrize("include", [[], INCLUDE])
def test_python_as_code_interpreter(include: list[str]) -> None:
    run = tool_run("python", '{"code":"print(1)"}', output="1\n")
    documents = events(run, tools=[CODE], include=include)
    assert kinds(documents)[2:] == [
        "output_item.added",
        "code_interpreter_call.in_progress",
        "code_interpreter_call_code.delta",
        "code_interpreter_call_code.done",
        "code_interpreter_call.interpreting",
        "code_interpreter_call.completed",
        "output_item.done",
        "completed",
    ]
    item = documents[-2]["item"]
    assert item["code"] == "print(1)"
    assert item["outputs"] == ([{"type": "logs", "logs": "1\n"}] if include else None)


@pytest.mark.parametrize("include", [[], INCLUDE])
def test_document_search_as_file_search(include: list[str]) -> None:
    run = tool_run("search_documents", '{"query":"city"}', output="Paris")
    documents = events(run, tools=[SEARCH], include=include)
    assert kinds(documents)[2:] == [
        "output_item.added",
        "file_search_call.in_progress",
        "file_search_call.searching",
        "file_search_call.completed",
        "output_item.done",
        "completed",
    ]
    item = documents[-2]["item"]
    assert item["queries"] == ["city"]
    assert item["results"] == ([{"text": "Paris"}] if include else None)


@pytest.mark.parametrize("name", ["python", "search_documents"])
def test_those_tools_are_mcp_calls_where_they_were_asked_for_as_such(name: str) -> None:
    documents = events(tool_run(name, "{}", output="x"), tools=[MCP])
    assert documents[-2]["item"]["type"] == "mcp_call"


def test_a_function_of_the_caller() -> None:
    documents = events(
        [
            CallDelta(0, "{", "call_1", "f"),
            CallDelta(0, "}"),
            ItemDone(0, FunctionCallItem("call_1", "f", "{}")),
            ENDED,
        ]
    )
    assert kinds(documents)[2:] == [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    item = documents[-2]["item"]
    assert (item["call_id"], item["name"], item["arguments"]) == ("call_1", "f", "{}")


def test_what_is_cut_off_is_incomplete() -> None:
    """Messages and calls of a step that ran into the limit, whether told to their end or not."""
    documents = events(
        [
            StepStarted(1, 1),
            TextDelta(0, "Hel"),
            CallDelta(1, '{"a', "call_1", "f"),
            TextDelta(2, "open"),
            StepEnded(1, USAGE, 1.0, 0, "length"),
            ItemDone(0, MessageItem("assistant", "Hel")),
            RunEnded("incomplete", USAGE, "max_output_tokens"),
        ]
    )
    assert kinds(documents)[-1] == "incomplete"
    response = documents[-1]["response"]
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [item["status"] for item in response["output"]] == ["incomplete"] * 3
    assert response["output"][1]["arguments"] == '{"a'
    assert response["completed_at"] is None


def test_a_run_that_fails() -> None:
    info = ErrorInfo("overloaded", "full", "model")
    documents = events([TextDelta(0, "Hel"), RunEnded("failed", USAGE, error=info)])
    assert kinds(documents)[-1] == "failed"
    error = documents[-1]["response"]["error"]
    assert error == {"code": "rate_limit_exceeded", "message": "full", "param": "model"}


def test_a_stream_that_breaks_off() -> None:
    made = stream()
    sent = made.chunk(TextDelta(0, "Hel")) + made.failed(ErrorInfo("unavailable", "gone"))
    documents = decoded(sent)
    assert [kind for kind in kinds(documents) if kind in ("error", "failed")] == ["error", "failed"]
    assert documents[-1]["response"]["error"]["code"] == "server_error"
    assert documents[-1]["response"]["output"][0]["status"] == "incomplete"


def test_steps_are_told_to_who_asks() -> None:
    documents = events(TEXT, steps=True)
    steps = [document for document in documents if document["type"].startswith("nvext.")]
    assert [step["type"] for step in steps] == ["nvext.step_started", "nvext.step_ended"]
    assert (steps[0]["prompt_items"], steps[1]["worker_id"]) == (2, 0)
    (step,) = documents[-1]["response"]["nvext"]["steps"]
    assert step["ttft_ms"] == 1.5


def checked(document: dict[str, Any], responses: Responses) -> Response:
    """The document is as documented, and as the official client's models have it."""
    schema = responses[200]["content"]["application/json"]["schema"]
    assert "$ref" not in json.dumps(schema), "references would point outside the schema"
    jsonschema_rs.validate({**schema, "unevaluatedProperties": False}, document)
    return Response.model_validate_json(json.dumps(document), strict=True)


CALLS = tool_run("python", '{"code":"print(1)"}', output="1\n")[:-1]


@pytest.mark.parametrize("steps", [False, True])
@pytest.mark.parametrize("run", [TEXT, [*CALLS, ENDED]])
def test_whole_responses_are_as_documented(run: list[AgentEvent], steps: bool) -> None:
    document = json.loads(stream(tools=[MCP, CODE], steps=steps).document(run))
    assert checked(document, RESPONSE_RESPONSES).status == "completed"


def test_what_is_stored_is_the_response() -> None:
    parameters: dict[str, Any] = {
        "tools": [CODE],
        "include": INCLUDE,
        "metadata": {"a": "b"},
        "instructions": "Be brief.",
        "conversation": "conv_1",
        "temperature": 0,
    }
    document = json.loads(stream(**parameters).document([*CALLS, ENDED]))
    stored = StoredResponse(
        id="resp_1",
        session="conv_1",
        created=document["completed_at"],
        model="m",
        status="completed",
        usage=USAGE,
        input=[MessageItem("user", "hi")],
        output=[ToolRunItem("call_1", "builtin", "python", '{"code":"print(1)"}', "1\n")],
        instructions="Be brief.",
        conversation="conv_1",
        document=task_of(**parameters).document,
    )
    assert stored_document(stored) == document
    checked(document, STORED_RESPONSES)


def test_the_clients_stream_helper() -> None:
    run = [*CALLS, TextDelta(1, "Hello"), ItemDone(1, MessageItem("assistant", "Hello")), ENDED]

    def handle(_: httpx2.Request) -> httpx2.Response:
        made = stream(tools=[CODE])
        content = b"".join(made.chunk(event) for event in run)
        return httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=content)

    http_client = httpx2.Client(transport=httpx2.MockTransport(handle))
    with (
        openai.OpenAI(api_key="none", base_url="http://test/v1", http_client=http_client) as api,
        api.responses.stream(model="m", input="hi") as events,
    ):
        final = events.get_final_response()
    assert final.output_text == "Hello"
    assert [item.type for item in final.output] == ["code_interpreter_call", "message"]
