"""Calls of tools that are forced match their schemas, as chapter 4's processor asks for them."""

import asyncio
import json
import time
from contextlib import aclosing
from typing import Any

from benchmarks.tool_schemas import tools_of
from common.engines.base import Engine
from common.protocol import ChatMessage, EngineOutput, GenerateRequest, SamplingParams
from common.protocol_agent import ToolProcessRequest
from common.protocol_tools import FunctionTool, ToolCall, ToolChoice
from common.text import TextModel, load_text_model
from common.text_stream import TextStream
from common.tool_calling import ToolCalling
from common.tool_grammar import LIMITS
from common.tool_schema import tightened
from common.tool_schema_size import longest
from tests.common.engines.engine_helpers import FakeContext
from tests.contract.backends import Backend
from tests.contract.requests import COUNT, ask, idle, refused

import jsonschema
import pytest
from msgspec.structs import replace

pytestmark = pytest.mark.asyncio(loop_scope="session")

# So many characters may a call have. It may have more tokens, so that none is cut off.
CHARACTERS = 500
PROMPT_TOKENS = 128
SCHEMAS = 14
AT_ONCE = 4
SAMPLING: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0.0}, "hot": {"temperature": 1.0}}
QUESTION = "Please do what is needed for my order of two tickets tomorrow."


def parameters(**properties: Any) -> dict[str, Any]:
    """The schema of an object that has all of these, and nothing else."""
    required = list(properties)
    own = {"properties": properties, "required": required, "additionalProperties": False}
    return {"type": "object", **own}


# What some makers of grammars pass over in silence.
HARD = FunctionTool(
    "hard",
    "Does what is hard.",
    parameters(
        five={"type": "integer", "multipleOf": 5, "minimum": 1, "maximum": 90},
        share={"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.5},
        code={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
        mail={"type": "string", "format": "email", "maxLength": 20},
        once={"type": "array", "items": {"enum": ["a", "b"]}, "uniqueItems": True},
        both={
            "allOf": [
                {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
                {"type": "object", "properties": {"y": {"const": 2}}, "required": ["y"]},
            ]
        },
        counts={"type": "object", "additionalProperties": {"type": "integer", "minimum": 7}},
        kind={"oneOf": [parameters(t={"const": "p"}), parameters(t={"const": "q"})]},
    ),
)


def fits(tool: FunctionTool) -> bool:
    definitions: dict[str, Any] = {}
    schema = tightened(tool, LIMITS[-1], definitions, "t")
    return longest(schema, definitions) <= CHARACTERS


TOOLS = [HARD, *filter(fits, tools_of(seed=1, count=60))][:SCHEMAS]


@pytest.fixture(scope="module")
def model(external: Backend, request: pytest.FixtureRequest) -> TextModel:
    return load_text_model(request.config.getoption("--engine-model"))


def forced(tools: list[FunctionTool], name: str | None = None, **fields: Any) -> ToolProcessRequest:
    return ToolProcessRequest(
        "any",
        [ChatMessage("user", QUESTION)],
        tools=tools,
        tool_choice=ToolChoice("required", name),
        **fields,
    )


async def calls_of(engine: Engine, model: TextModel, request: ToolProcessRequest) -> list[ToolCall]:
    """What the processor makes of the engine's answer."""
    calling = ToolCalling(model, request)
    prompt = calling.token_ids()[-PROMPT_TOKENS:]
    sampling = replace(
        calling.sampling(CHARACTERS), max_tokens=engine.info.context_length - len(prompt)
    )
    text = TextStream(
        model, [], min_tokens=0, prompt_tokens=len(prompt), started=time.perf_counter()
    )
    calls: list[ToolCall] = []
    finish_reason = None
    async for item in engine.generate(GenerateRequest(prompt, sampling), FakeContext()):
        output = calling.push(text.push(item))
        finish_reason = output.finish_reason
        for delta in output.tool_calls:
            if delta.id is not None:
                calls.append(ToolCall(delta.id, delta.name or "", ""))
            calls[delta.index].arguments += delta.arguments
    assert finish_reason == "tool_calls", calls
    return calls


async def all_calls(
    engine: Engine, model: TextModel, requests: list[ToolProcessRequest]
) -> list[list[ToolCall]]:
    """The calls of each, a few at a time."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def ask(request: ToolProcessRequest) -> list[ToolCall]:
        async with gate:
            return await calls_of(engine, model, request)

    return await asyncio.gather(*(ask(request) for request in requests))


def check(calls: list[ToolCall], tools: list[FunctionTool]) -> None:
    """They are of these tools, and as their own schemas say."""
    schemas = {tool.name: tool.parameters or {} for tool in tools}
    for call in calls:
        arguments = json.loads(call.arguments)
        jsonschema.Draft202012Validator(schemas[call.name]).validate(arguments)


@pytest.mark.parametrize("sampling", SAMPLING)
async def test_a_named_tool(engine: Engine, model: TextModel, sampling: str) -> None:
    """Many schemas, several at a time; each answer is one call, whole."""
    requests = [
        forced([tool], tool.name, sampling=SamplingParams(**SAMPLING[sampling])) for tool in TOOLS
    ]
    answers = await all_calls(engine, model, requests)
    for tool, calls in zip(TOOLS, answers, strict=True):
        assert [call.name for call in calls] == [tool.name]
        check(calls, [tool])


@pytest.mark.parametrize("parallel", [False, True])
async def test_one_of_several_tools(engine: Engine, model: TextModel, parallel: bool) -> None:
    """Which and, if `parallel`, how many of them is up to the model."""
    threes = [TOOLS[start : start + 3] for start in range(0, len(TOOLS) - 2, 3)]
    requests = [forced(three, parallel_tool_calls=parallel) for three in threes]
    answers = await all_calls(engine, model, requests)
    for three, calls in zip(threes, answers, strict=True):
        assert 1 <= len(calls) <= (4 if parallel else 1)
        check(calls, three)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "^(?=a)b"},  # there is no such thing in its grammars
        {"type": "string", "pattern": "^a{1000000}$"},  # found out in the midst
        {"type": "object", "properties": {"a": False}, "required": ["a"]},  # nothing matches
        {"$ref": "#/$defs/0", "$defs": {str(n): {"$ref": f"#/$defs/{n + 1}"} for n in range(900)}},
    ],
    ids=["pattern", "size", "nothing", "depth"],
)
async def test_a_schema_that_the_engine_cannot_keep_to(
    external: Backend, engine: Engine, schema: dict[str, Any]
) -> None:
    """It is refused, and harms nobody."""
    others = asyncio.create_task(ask(engine, COUNT, max_tokens=20, ignore_eos=True))
    await refused(engine, COUNT, "json_schema", json_schema=json.dumps(schema), max_tokens=40)
    assert len((await others).token_ids) == 20
    await idle(engine)


@pytest.mark.parametrize("at_once", [True, False])
async def test_a_request_that_is_stopped_while_its_grammar_is_made(
    external: Backend, engine: Engine, at_once: bool
) -> None:
    """Its grammar takes a while; the engine goes on without it."""
    multiple = 99_991 if at_once else 99_989
    items = {"type": "integer", "multipleOf": multiple}
    schema = json.dumps({"type": "array", "items": items, "minItems": 200})
    context = FakeContext()
    request = GenerateRequest(COUNT, SamplingParams(max_tokens=300, json_schema=schema))

    async def read() -> EngineOutput:
        async with aclosing(engine.generate(request, context)) as outputs:
            return [item async for item in outputs][-1]

    reading = asyncio.create_task(read())
    if at_once:
        await asyncio.sleep(0)
    else:
        await ask(engine, COUNT, max_tokens=2, ignore_eos=True)
    context.stop()
    assert (await reading).finish_reason == "cancelled"
    await idle(engine)
    assert len((await ask(engine, COUNT, max_tokens=3, ignore_eos=True)).token_ids) == 3
