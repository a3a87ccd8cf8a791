"""Calls that the bundled model makes, by the official client over the whole pipeline."""

import json
import uuid
from collections.abc import AsyncIterator
from typing import Any

from benchmarks.tool_schemas import tools_of
from chapter4.migration import Progress
from common.engines.llamacpp import LlamaCppEngine, LlamaCppSettings
from common.model_files import DEFAULT_MODEL
from common.protocol import ChatMessage, GenerateRequest, SamplingParams, TextOutput
from common.protocol_agent import ToolProcessRequest
from common.protocol_tools import FunctionTool, ToolCall, ToolChoice
from common.text import load_text_model
from common.tool_calling import ToolCalling
from launch.chapters import Options
from launch.children import Children
from launch.pipeline import Pipeline, pipeline
from launch.ports import free_port
from tests.chapter1.helpers import MODEL, engine_settings
from tests.common.engines.engine_helpers import ONE_THREAD, FakeContext

import jsonschema
import openai
import pytest
import pytest_asyncio

TOOLS = tools_of(seed=7, count=12, depth=1, recursive=False)
SIMPLE = FunctionTool(
    "find",
    "Find a place.",
    {"type": "object", "properties": {"name": {"type": "string"}, "near": {"type": "boolean"}}},
)
QUESTION: Any = [{"role": "user", "content": "Book a table for two tomorrow, please."}]


def shape(tool: FunctionTool) -> Any:
    return {"type": "function", "function": {"name": tool.name, "parameters": tool.parameters}}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def running(servers: dict[str, str]) -> AsyncIterator[Pipeline]:
    lines: list[str] = []
    with Children(lambda name, line: lines.append(f"{name:>10} | {line}")) as children:
        options = Options(namespace=f"test-{uuid.uuid4().hex[:12]}", engines=1, port=free_port())
        settings = {"engine": engine_settings(**ONE_THREAD)}
        async with pipeline(children, servers, "chapter4", options, arguments=settings) as running:
            await running.wait_ready()
            yield running
            running.kill()
    print(*lines[-200:], sep="\n")


@pytest_asyncio.fixture
async def api(running: Pipeline) -> AsyncIterator[openai.AsyncOpenAI]:
    url = f"{running.url}/v1"
    async with openai.AsyncOpenAI(api_key="none", base_url=url, max_retries=0) as client:
        yield client


def check_calls(calls: list[Any], tools: list[FunctionTool]) -> None:
    parameters = {tool.name: tool.parameters or {} for tool in tools}
    for call in calls:
        arguments = json.loads(call.function.arguments)
        jsonschema.Draft202012Validator(parameters[call.function.name]).validate(arguments)


@pytest.mark.parametrize("tool", TOOLS, ids=range(len(TOOLS)))
async def test_a_named_function_is_called_with_arguments_of_its_schema(
    api: openai.AsyncOpenAI, tool: FunctionTool
) -> None:
    response = await api.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        tools=[shape(tool)],
        tool_choice={"type": "function", "function": {"name": tool.name}},
        max_tokens=60,
        seed=1,
    )
    [choice] = response.choices
    assert choice.finish_reason == "tool_calls"
    assert not choice.message.content
    [call] = choice.message.tool_calls or []
    assert call.id.startswith("call_")
    check_calls([call], [tool])


@pytest.mark.parametrize("parallel", [True, False])
async def test_a_required_call_is_of_one_of_the_tools(
    api: openai.AsyncOpenAI, parallel: bool
) -> None:
    response = await api.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        tools=[shape(tool) for tool in (SIMPLE, *TOOLS[:1])],
        tool_choice="required",
        parallel_tool_calls=parallel,
        max_tokens=100,
        seed=2,
    )
    [choice] = response.choices
    calls = choice.message.tool_calls or []
    assert choice.finish_reason == "tool_calls"
    assert 1 <= len(calls) <= (4 if parallel else 1)
    assert len({call.id for call in calls}) == len(calls)
    check_calls(calls, [SIMPLE, *TOOLS[:1]])


async def test_no_call_where_none_may_be(api: openai.AsyncOpenAI) -> None:
    response = await api.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        tools=[shape(TOOLS[0])],
        tool_choice="none",
        max_tokens=20,
        stop=["table"],
        seed=1,
    )
    [choice] = response.choices
    assert not choice.message.tool_calls
    assert choice.finish_reason in ("stop", "length")
    assert "table" not in (choice.message.content or "")


async def test_a_schema_that_cannot_be_kept_to_is_refused(api: openai.AsyncOpenAI) -> None:
    tool = FunctionTool("f", "", {"type": "object", "properties": {"x": {"not": {}}}})
    with pytest.raises(openai.BadRequestError, match="'not' is not supported") as caught:
        await api.chat.completions.create(
            model=MODEL, messages=QUESTION, tools=[shape(tool)], tool_choice="required"
        )
    assert caught.value.param == "tools"


async def test_a_schema_that_the_engine_cannot_keep_to_is_refused(api: openai.AsyncOpenAI) -> None:
    """It is the engine that finds out; the client learns where the schema came from."""
    properties = {"x": {"type": "string", "pattern": "^(?=a)"}}
    tool = FunctionTool("f", "", {"type": "object", "properties": properties})
    with pytest.raises(openai.BadRequestError, match="look-around") as caught:
        await api.chat.completions.create(
            model=MODEL, messages=QUESTION, tools=[shape(tool)], tool_choice="required"
        )
    assert caught.value.param == "tools"


async def test_another_engine_goes_on_in_the_midst_of_a_forced_call() -> None:
    """The call as the first engine would have ended it; with one at a time, greedy is exact."""
    model = load_text_model(DEFAULT_MODEL)
    engine = await LlamaCppEngine.start(LlamaCppSettings(**ONE_THREAD))
    try:
        request = ToolProcessRequest(
            DEFAULT_MODEL,
            [ChatMessage("user", "Where?")],
            tools=[SIMPLE],
            tool_choice=ToolChoice("required", SIMPLE.name),
            sampling=SamplingParams(temperature=0.0, max_tokens=40),
        )
        calling = ToolCalling(model, request)
        prompt = calling.token_ids()
        sampling = calling.sampling(1000)

        async def answer(generate: GenerateRequest) -> list[int]:
            items = engine.generate(generate, FakeContext())
            return [token async for item in items for token in item.token_ids]

        progress = Progress(prompt, sampling, 2048)
        whole = await answer(progress.request())
        for made in (1, len(whole) // 2, len(whole) - 1):
            progress.tokens = whole[:made]
            assert await answer(progress.request()) == whole[made:]
        text = model.detokenizer().push(whole)
        jsonschema.Draft202012Validator(SIMPLE.parameters or {}).validate(json.loads(text))
    finally:
        await engine.close()


async def test_the_engine_has_every_token_of_a_call_when_the_conversation_goes_on() -> None:
    """The tokens that it made itself are those of the next prompt.

    Unless they are unusual ones, which a model may take where a grammar leaves it little choice.
    """
    place = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
    tool = FunctionTool("find", "Find a place.", place)
    model = load_text_model(DEFAULT_MODEL)
    engine = await LlamaCppEngine.start(LlamaCppSettings(**ONE_THREAD))
    messages = [ChatMessage("user", "Find me a place to eat near the sea.")]
    known: list[int] = []
    usual = 0  # so many of its tokens at least are those that its text has
    try:
        for _ in range(3):
            request = ToolProcessRequest(
                DEFAULT_MODEL,
                messages,
                tools=[tool],
                tool_choice=ToolChoice("required", tool.name),
                sampling=SamplingParams(temperature=0.0, max_tokens=60),
            )
            calling = ToolCalling(model, request)
            prompt = calling.token_ids()
            assert prompt[:usual] == known[:usual]
            generate = GenerateRequest(prompt, calling.sampling(1000))
            items = [item async for item in engine.generate(generate, FakeContext())]
            assert (items[0].cached_tokens or 0) >= usual // 16 * 16
            made = [token for item in items for token in item.token_ids]
            known = [*prompt, *made]
            text = model.detokenizer().push(made)
            as_written_later = json.dumps(json.loads(text), ensure_ascii=False)
            usual = len(known) if made == model.encode(as_written_later) else len(prompt)
            output = calling.push(TextOutput(text, len(made)))
            [delta] = output.tool_calls
            call = ToolCall(delta.id or "", tool.name, delta.arguments)
            result = ChatMessage("tool", "It is closed.", tool_call_id=call.id)
            messages = [*messages, ChatMessage("assistant", "", [call]), result]
    finally:
        await engine.close()
