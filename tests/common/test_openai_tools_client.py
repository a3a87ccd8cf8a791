"""The official `openai` client's own helpers for tools understand chats with calls."""

from typing import Any

from common.openai import (
    ChatStream,
    ToolChatRequest,
    chat_response,
    to_tool_process_request,
)
from common.openai_fields import parse
from common.protocol import TextOutput, Usage
from common.protocol_agent import ToolProcessRequest
from common.protocol_tools import ToolCallDelta

import httpx2
import openai
import pytest
from pydantic import BaseModel

MESSAGES: list[Any] = [{"role": "user", "content": "Weather?"}]
CALLS = [
    TextOutput(tool_calls=[ToolCallDelta(0, id="call_a", name="Weather")]),
    TextOutput(tool_calls=[ToolCallDelta(0, '{"city":')]),
    TextOutput(
        tool_calls=[ToolCallDelta(0, '"Paris"}'), ToolCallDelta(1, "{}", "call_b", "Now")],
        tokens=9,
    ),
    TextOutput(finish_reason="tool_calls", usage=Usage(9, 9)),
]


class Weather(BaseModel):
    """The weather in a city."""

    city: str


class Now(BaseModel):
    """The time."""


class Server:
    """Answers every chat with `outputs`; `received` has what the processor would have got."""

    def __init__(self, outputs: list[TextOutput]) -> None:
        self.outputs = outputs
        self.received: list[ToolProcessRequest] = []
        transport = httpx2.MockTransport(self._answer)
        self.api = openai.OpenAI(
            api_key="none",
            base_url="http://test/v1",
            max_retries=0,
            http_client=httpx2.Client(transport=transport),
        )

    def _answer(self, http: httpx2.Request) -> httpx2.Response:
        request = parse(ToolChatRequest, http.read())
        self.received.append(to_tool_process_request(request))
        if not request.stream:
            content = chat_response("r", request, self.outputs)
            return httpx2.Response(200, content=content)
        stream = ChatStream("r", request)
        content = b"".join(stream.chunk(output) for output in self.outputs)
        return httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=content)


TOOLS: list[Any] = [openai.pydantic_function_tool(Weather), openai.pydantic_function_tool(Now)]


def test_calls_are_parsed_and_can_be_sent_back() -> None:
    server = Server(CALLS)
    with server.api as api:
        message = api.chat.completions.parse(model="m", messages=MESSAGES, tools=TOOLS)
        said = message.choices[0].message
        assert said.content is None
        assert said.tool_calls is not None
        assert [call.function.parsed_arguments for call in said.tool_calls] == [
            Weather(city="Paris"),
            Now(),
        ]
        results: list[Any] = [
            {"role": "tool", "tool_call_id": call.id, "content": "ok"} for call in said.tool_calls
        ]
        messages: list[Any] = [*MESSAGES, said, *results]
        api.chat.completions.create(model="m", messages=messages, tools=TOOLS)
    first, second = server.received
    assert [tool.name for tool in first.tools] == ["Weather", "Now"]
    assert second.messages is not None
    assert [call.arguments for call in second.messages[1].tool_calls] == ['{"city":"Paris"}', "{}"]


def test_the_helpers_under_their_old_name() -> None:
    with Server(CALLS).api as api:
        helpers = api.beta.chat.completions
        answers = [helpers.parse(model="m", messages=MESSAGES, tools=TOOLS)]
        with helpers.stream(model="m", messages=MESSAGES, tools=TOOLS) as stream:
            answers.append(stream.get_final_completion())
    for answer in answers:
        calls = answer.choices[0].message.tool_calls
        assert calls is not None
        assert calls[0].function.parsed_arguments == Weather(city="Paris")


def test_streamed_calls_are_put_together() -> None:
    with Server(CALLS).api as api:
        chunks = list(
            api.chat.completions.create(model="m", messages=MESSAGES, tools=TOOLS, stream=True)
        )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content is None
    deltas = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or []]
    assert [(d.index, d.id, d.type) for d in deltas] == [
        (0, "call_a", "function"),
        (0, None, None),
        (0, None, None),
        (1, "call_b", "function"),
    ]
    pieces = [(d.function.name, d.function.arguments) for d in deltas if d.function]
    assert pieces == [("Weather", ""), (None, '{"city":'), (None, '"Paris"}'), ("Now", "{}")]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_the_stream_helper_has_events_for_calls() -> None:
    with (
        Server(CALLS).api as api,
        api.chat.completions.stream(model="m", messages=MESSAGES, tools=TOOLS) as stream,
    ):
        events = list(stream)
        final = stream.get_final_completion().choices[0]
    done = [e for e in events if e.type == "tool_calls.function.arguments.done"]
    assert [(e.index, e.name, e.parsed_arguments) for e in done] == [
        (0, "Weather", Weather(city="Paris")),
        (1, "Now", Now()),
    ]
    assert "tool_calls.function.arguments.delta" in [event.type for event in events]
    assert final.finish_reason == "tool_calls"
    assert final.message.content is None
    assert final.message.tool_calls is not None
    assert [call.id for call in final.message.tool_calls] == ["call_a", "call_b"]


@pytest.mark.parametrize("empty_first", [False, True])
def test_a_streamed_answer_without_a_call_has_a_content(empty_first: bool) -> None:
    outputs = [TextOutput(tokens=1)] if empty_first else []
    outputs += [TextOutput("Sunny."), TextOutput(finish_reason="stop")]
    with (
        Server(outputs).api as api,
        api.chat.completions.stream(model="m", messages=MESSAGES, tools=TOOLS) as stream,
    ):
        message = stream.get_final_completion().choices[0].message
    assert message.content == "Sunny."
    assert not message.tool_calls


def test_the_content_of_an_answer_that_is_known_late_to_be_a_call_is_null() -> None:
    with (
        Server([TextOutput(tokens=1), *CALLS]).api as api,
        api.chat.completions.stream(model="m", messages=MESSAGES, tools=TOOLS) as stream,
    ):
        assert stream.get_final_completion().choices[0].message.content is None
