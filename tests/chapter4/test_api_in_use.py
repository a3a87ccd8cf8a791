"""Chapter 4's API with the official `openai` client, on a pipeline whose engine has a script."""

import json
import shlex
import sys
import uuid
from collections.abc import AsyncIterator
from typing import Any

from launch.pipeline import Pipeline
from tests.chapter1.helpers import MODEL, eventually, http_client, is_healthy, nothing_in_flight
from tests.chapter4.scripted import CALL, scripted_pipeline
from tests.project_files import ROOT

import openai
import pytest
import pytest_asyncio
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

SCRIPT = [
    # A rule fits a prompt that has all its words in this order.
    (r"(?s)Add two.*<tool_output>.*Thanks", "You are welcome."),
    (r"(?s)Add two.*<tool_output>", "It is 4."),
    (r"Add two", CALL % ("calculator", '{"expression": "2+2"}')),
    (r"(?s)What is the weather.*18 degrees", "Sunny, 18 degrees."),
    (r"What is the weather", CALL % ("Weather", '{"city": "Paris"}')),
    (
        r"Ask for both",
        CALL % ("Weather", '{"city": "Paris"}') + CALL % ("Weather", '{"city": "Rome"}'),
    ),
    (r"Sleep", CALL % ("python", '{"code": "import time; time.sleep(300)"}')),
    (r"Which city", '{"city": "Paris"}'),
    (r"Hello", "Hello, you."),
]
MCP_SERVER = shlex.join([sys.executable, str(ROOT / "tests" / "chapter4" / "mcp_server.py")])
BUILTIN: Any = {
    "type": "mcp",
    "server_label": "builtin",
    "allowed_tools": ["calculator"],
    "require_approval": "never",
}


class Weather(BaseModel):
    """The weather in a city."""

    city: str


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def running(
    servers: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Pipeline]:
    folder = tmp_path_factory.mktemp("script")
    arguments = {"agent": ["--mcp", f"adder={MCP_SERVER}"]}
    async with scripted_pipeline(servers, folder, SCRIPT, arguments) as running:
        yield running


@pytest_asyncio.fixture
async def api(running: Pipeline) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        api_key="none", base_url=f"{running.url}/v1", max_retries=0
    ) as api:
        yield api


async def test_a_chat_calls_and_goes_on(api: openai.AsyncOpenAI) -> None:
    tools: Any = [openai.pydantic_function_tool(Weather)]
    messages: list[Any] = [{"role": "user", "content": "What is the weather?"}]
    answer = await api.chat.completions.parse(model=MODEL, messages=messages, tools=tools)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.function.parsed_arguments == Weather(city="Paris")
    result = {"role": "tool", "tool_call_id": call.id, "content": "18 degrees"}
    messages += [choice.message, result]
    final = await api.chat.completions.create(model=MODEL, messages=messages, tools=tools)
    assert final.choices[0].message.content == "Sunny, 18 degrees."
    assert final.choices[0].finish_reason == "stop"


async def test_streamed_chat_calls(api: openai.AsyncOpenAI) -> None:
    tools: Any = [openai.pydantic_function_tool(Weather)]
    messages: Any = [{"role": "user", "content": "Ask for both."}]
    async with api.chat.completions.stream(model=MODEL, messages=messages, tools=tools) as stream:
        done = [e async for e in stream if e.type == "tool_calls.function.arguments.done"]
    assert [event.parsed_arguments for event in done] == [
        Weather(city="Paris"),
        Weather(city="Rome"),
    ]


async def test_a_chat_calls_or_answers_in_a_form(api: openai.AsyncOpenAI) -> None:
    tools: Any = [openai.pydantic_function_tool(Weather)]
    question: Any = [{"role": "user", "content": "What is the weather?"}]
    calling = await api.chat.completions.parse(
        model=MODEL, messages=question, tools=tools, response_format=Weather
    )
    called = calling.choices[0].message
    assert called.tool_calls is not None
    assert called.tool_calls[0].function.parsed_arguments == Weather(city="Paris")
    assert called.content is None

    question = [{"role": "user", "content": "Which city?"}]
    answer = await api.chat.completions.parse(
        model=MODEL, messages=question, tools=tools, response_format=Weather
    )
    assert answer.choices[0].message.parsed == Weather(city="Paris")
    assert answer.choices[0].finish_reason == "stop"
    free = await api.chat.completions.create(model=MODEL, messages=question, tools=tools)
    assert answer.usage is not None
    assert free.usage is not None
    assert answer.usage.prompt_tokens == free.usage.prompt_tokens
    assert answer.usage.completion_tokens == 2 * free.usage.completion_tokens, "draft and answer"
    async with api.chat.completions.stream(
        model=MODEL, messages=question, tools=tools, response_format=Weather
    ) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.parsed == Weather(city="Paris")


async def test_a_run_calls_a_tool_and_answers_and_is_stored(api: openai.AsyncOpenAI) -> None:
    response = await api.responses.create(model=MODEL, input="Add two and two.", tools=[BUILTIN])
    check(response)
    stored = await api.responses.retrieve(response.id)
    check(stored)
    assert without_times(stored) == without_times(response)
    assert [item.type for item in response.output] == ["mcp_call", "message"]
    assert response.output_text == "It is 4."
    assert response.status == "completed"


async def test_a_streamed_run_has_every_event(api: openai.AsyncOpenAI, running: Pipeline) -> None:
    body = {"model": MODEL, "input": "Add two and two.", "tools": [BUILTIN], "stream": True}
    events = []
    async with (
        http_client(running.url) as client,
        client.stream("POST", "/v1/responses", json=body) as answer,
    ):
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                events.append(json.loads(line.removeprefix("data: ")))
                adapter = TypeAdapter[Any](ResponseStreamEvent)
                adapter.validate_json(line.removeprefix("data: "), strict=True)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = list(dict.fromkeys(event["type"] for event in events))
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.mcp_call.in_progress",
        "response.mcp_call_arguments.delta",
        "response.mcp_call_arguments.done",
        "response.mcp_call.completed",
        "response.output_item.done",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.completed",
    ]


async def test_runs_go_on_and_are_deleted(api: openai.AsyncOpenAI) -> None:
    async with api.responses.stream(
        model=MODEL, input="Add two and two.", tools=[BUILTIN], metadata={"a": "b"}
    ) as stream:
        final = await stream.get_final_response()
    stored = await api.responses.retrieve(final.id)
    check(stored)
    assert stored.output_text == final.output_text
    again = await api.responses.create(
        model=MODEL, input="Thanks!", previous_response_id=final.id, tools=[BUILTIN]
    )
    assert again.output_text == "You are welcome."
    assert again.previous_response_id == final.id
    assert again.conversation is not None
    await api.responses.delete(final.id)
    with pytest.raises(openai.NotFoundError) as caught:
        await api.responses.retrieve(final.id)
    assert caught.value.code == "not_found"
    deleted = await api.conversations.delete(again.conversation.id)
    assert deleted.deleted
    with pytest.raises(openai.NotFoundError):
        await api.responses.retrieve(again.id)


async def test_a_function_of_the_caller(api: openai.AsyncOpenAI) -> None:
    tools: Any = [
        {
            "type": "function",
            "name": "Weather",
            "parameters": Weather.model_json_schema(),
            "strict": True,
        }
    ]
    first = await api.responses.parse(model=MODEL, input="What is the weather?", tools=tools)
    check(first)
    (call,) = first.output
    assert call.type == "function_call"
    assert call.parsed_arguments == {"city": "Paris"}
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "18 degrees"}
    last = await api.responses.create(
        model=MODEL, input=[output], previous_response_id=first.id, tools=tools
    )
    assert last.output_text == "Sunny, 18 degrees."
    history: Any = [{"role": "user", "content": "What is the weather?"}, *first.output, output]
    same = await api.responses.create(model=MODEL, input=history, tools=tools, store=False)
    assert same.output_text == "Sunny, 18 degrees."


async def test_answers_of_a_form_are_parsed(api: openai.AsyncOpenAI) -> None:
    answer = await api.responses.parse(model=MODEL, input="Which city?", text_format=Weather)
    check(answer)
    assert answer.output_parsed == Weather(city="Paris")
    async with api.responses.stream(
        model=MODEL, input="Which city?", text_format=Weather
    ) as stream:
        assert (await stream.get_final_response()).output_parsed == Weather(city="Paris")


async def test_a_run_that_cannot_begin_is_a_status(api: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await api.responses.create(model=MODEL, input="Hello", previous_response_id="resp_x")
    assert missing.value.param == "previous_response_id"
    elsewhere: Any = {**BUILTIN, "server_label": "elsewhere"}
    with pytest.raises(openai.BadRequestError, match="elsewhere"):
        await api.responses.create(model=MODEL, input="Hello", tools=[elsewhere])


async def test_a_choice_is_of_the_set_that_it_names(api: openai.AsyncOpenAI) -> None:
    """Both sets are whole: only the agent knows what is in them."""
    sets: Any = [
        {"type": "mcp", "server_label": label, "require_approval": "never"}
        for label in ("builtin", "adder")
    ]
    for label, name in (("adder", "calculator"), ("builtin", "add"), ("adder", "multiply")):
        choice: Any = {"type": "mcp", "server_label": label, "name": name}
        with pytest.raises(openai.BadRequestError, match=name) as caught:
            await api.responses.create(
                model=MODEL, input="Hello", tools=sets, tool_choice=choice, store=False
            )
        assert caught.value.param == "tool_choice"
    choice = {"type": "mcp", "server_label": "adder", "name": "f"}
    function: Any = {"type": "function", "name": "f", "parameters": {}}
    with pytest.raises(openai.BadRequestError) as caught:
        await api.responses.create(
            model=MODEL, input="Hello", tools=[*sets, function], tool_choice=choice
        )
    assert caught.value.param == "tool_choice"


async def test_without_truncation_what_is_too_long_is_refused(api: openai.AsyncOpenAI) -> None:
    conversation = f"conv_{uuid.uuid4().hex}"
    text = "Hello" + " the" * 4500  # two of them are more than the context has room for
    first = await api.responses.create(
        model=MODEL, input=text, conversation=conversation, truncation="disabled"
    )
    assert first.truncation == "disabled"
    with pytest.raises(openai.BadRequestError, match="context length") as caught:
        await api.responses.create(
            model=MODEL, input=text, conversation=conversation, truncation="disabled"
        )
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input")
    second = await api.responses.create(model=MODEL, input=text, conversation=conversation)
    assert (second.status, second.truncation) == ("completed", "auto")
    chat: Any = [{"role": "user", "content": text}] * 2
    with pytest.raises(openai.BadRequestError) as caught:
        await api.chat.completions.create(model=MODEL, messages=chat)
    assert caught.value.code == "context_length_exceeded"


async def test_a_client_that_leaves_ends_the_run_and_its_tool(
    api: openai.AsyncOpenAI, running: Pipeline
) -> None:
    """Until then nobody else gets its conversation; then it is free, and nothing was said in it."""
    conversation = f"conv_{uuid.uuid4().hex}"
    code: Any = {"type": "code_interpreter", "container": {"type": "auto"}}
    async with await api.responses.create(
        model=MODEL, input="Sleep.", conversation=conversation, tools=[code], stream=True
    ) as events:
        async for event in events:
            if event.type == "response.code_interpreter_call.interpreting":
                break
        with pytest.raises(openai.ConflictError):
            await api.responses.create(model=MODEL, input="Hello", conversation=conversation)

    async def answered() -> bool:
        try:
            await api.responses.create(model=MODEL, input="Hello", conversation=conversation)
        except openai.ConflictError:
            return False
        return True

    await eventually(answered)
    async with http_client(running.url) as client:
        await nothing_in_flight(client)
        metrics = (await client.get("/metrics")).text
    assert 'dynamo_frontend_requests_total{endpoint="responses",status="499"}' in metrics


async def test_the_openapi_document_has_the_routes(running: Pipeline) -> None:
    async with http_client(running.url) as client:
        paths = (await client.get("/openapi.json")).json()["paths"]
    assert set(paths["/v1/responses"]["post"]["responses"]) >= {"200", "400", "404", "409", "503"}
    assert set(paths["/v1/responses/{response_id}"]) == {"get", "delete"}
    body = paths["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]
    assert "tools" in body["schema"]["properties"]


async def test_what_is_stored_takes_no_other_parameters(api: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await api.responses.retrieve("resp_1", stream=True)
    assert caught.value.param == "stream"


async def test_runs_are_counted(api: openai.AsyncOpenAI, running: Pipeline) -> None:
    await api.responses.create(model=MODEL, input="Hello", store=False)
    async with http_client(running.url) as client:
        await nothing_in_flight(client)
        metrics = (await client.get("/metrics")).text
    assert 'dynamo_frontend_requests_total{endpoint="responses",status="200"}' in metrics


async def test_without_an_agent_it_is_not_healthy(
    api: openai.AsyncOpenAI, running: Pipeline
) -> None:
    assert await running.processes["agent"].stop() == 0
    async with http_client(running.url) as client:

        async def is_unhealthy() -> bool:
            health = await client.get("/health")
            return health.status_code == 503 and "No agent" in health.json()["reason"]

        await eventually(is_unhealthy)
        with pytest.raises(openai.InternalServerError) as caught:
            await api.responses.create(model=MODEL, input="Hello", store=False)
        assert caught.value.status_code == 503
        await running.processes["agent"].restart()
        await eventually(lambda: is_healthy(client))


def check(response: Response) -> None:
    """It has what the client's models say that it has, and nothing of a wrong type."""
    Response.model_validate_json(response.model_dump_json(by_alias=True), strict=True)


def without_times(response: Response) -> dict[str, Any]:
    return response.model_dump(mode="json", exclude={"completed_at"})
