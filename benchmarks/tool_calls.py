"""Whether a small model's calls of tools match the tools' schemas.

Tools with generated schemas are offered to the bundled 135M model over chapter 4's processor,
router and engines, with every kind of choice: each tool by name, one of three that must be called,
up to four calls that must come, and with the model's own will. `forced_valid_share` is the share of
the forced answers whose calls are all complete and match their tools' own schemas.
"""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.report import GuardError, argument_parser, median, percentile, write_result
from benchmarks.tool_schemas import tools_of
from common.model_files import DEFAULT_MODEL
from common.protocol import ChatMessage, SamplingParams, TextOutput, from_wire, to_wire
from common.protocol_agent import ToolProcessRequest
from common.protocol_tools import FunctionTool, ToolCall, ToolChoice
from launch.chapters import Options
from launch.children import Children
from launch.pipeline import pipeline
from launch.ports import free_port
from launch.servers import etcd_server, nats_server, server_environment

import jsonschema
import uvloop
from dynamo.runtime import Client, DistributedRuntime

NAMESPACE = "tool-calls"
SEEDS = (1, 2, 3)
STREAMS = 2
MAX_TOKENS = 400
READY_S = 120.0
PATIENT = {"router": ["--queue-timeout", "600"]}  # the share is measured, not the speed
QUESTION = "Please do what is needed for my order of two tickets tomorrow."
FORCED = ("named", "required", "parallel")


@dataclass(frozen=True)
class Answer:
    """What came of one request; `problem` says why its calls are not what they should be."""

    calls: list[ToolCall]
    problem: str | None
    seconds: float
    tokens: int


def requests_of(tools: list[FunctionTool], seed: int) -> dict[str, list[ToolProcessRequest]]:
    """By choice: each tool by its name, and three at a time."""
    threes = [tools[start : start + 3] for start in range(0, len(tools), 3)]

    def request(
        tools: list[FunctionTool], choice: ToolChoice, *, parallel: bool = False, tokens: int = 0
    ) -> ToolProcessRequest:
        return ToolProcessRequest(
            DEFAULT_MODEL,
            [ChatMessage("user", QUESTION)],
            sampling=SamplingParams(max_tokens=tokens or MAX_TOKENS, seed=seed),
            tools=tools,
            tool_choice=choice,
            parallel_tool_calls=parallel,
        )

    required = ToolChoice("required")
    return {
        "named": [request([tool], ToolChoice("required", tool.name)) for tool in tools],
        "required": [request(three, required) for three in threes],
        "parallel": [request(three, required, parallel=True) for three in threes],
        "auto": [request(three, ToolChoice(), parallel=True, tokens=64) for three in threes],
        "none": [request(three, ToolChoice("none"), tokens=64) for three in threes],
    }


async def ask(processor: Client, request: ToolProcessRequest) -> Answer:
    """Send a request and check the calls of its answer."""
    began = time.perf_counter()
    calls: list[ToolCall] = []
    last = TextOutput()
    async for item in await processor.round_robin(to_wire(request), annotated=False):
        last = from_wire(item, TextOutput)
        if last.error is not None:
            raise GuardError(f"{request.tool_choice}: {last.error.message}")
        for delta in last.tool_calls:
            if delta.id is not None:
                calls.append(ToolCall(delta.id, delta.name or "", ""))
            calls[delta.index].arguments += delta.arguments
    forced = request.tool_choice.mode == "required"
    problem = next(filter(None, (problem_of(call, request.tools) for call in calls)), None)
    if forced and (not calls or last.finish_reason != "tool_calls"):
        problem = problem or f"{len(calls)} calls, finish reason {last.finish_reason}"
    tokens = last.usage.completion_tokens if last.usage else 0
    return Answer(calls, problem, time.perf_counter() - began, tokens)


def problem_of(call: ToolCall, tools: list[FunctionTool]) -> str | None:
    """Why a call does not match its tool's own schema; None if it does."""
    parameters = {tool.name: tool.parameters for tool in tools}.get(call.name)
    if parameters is None:
        return f"there is no tool {call.name!r}"
    try:
        jsonschema.Draft202012Validator(parameters).validate(json.loads(call.arguments))
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{call.arguments}: {error}"
    return None


async def ask_all(processor: Client, requests: list[ToolProcessRequest]) -> list[Answer]:
    waiting = iter(requests)
    answers: list[Answer] = []

    async def stream() -> None:
        for request in waiting:
            answers.append(await ask(processor, request))

    await asyncio.gather(*(stream() for _ in range(STREAMS)))
    return answers


def row(choice: str, answers: list[Answer]) -> dict[str, Any]:
    seconds = [answer.seconds for answer in answers]
    valid = sum(answer.problem is None for answer in answers)
    return {
        "choice": choice,
        "answers": len(answers),
        "calls": sum(len(answer.calls) for answer in answers),
        "valid_share": valid / len(answers),
        "seconds_p50": round(median(seconds), 3),
        "seconds_p95": round(percentile(seconds, 0.95), 3),
        "tokens_p50": median([answer.tokens for answer in answers]),
    }


def forced_valid_share(by_choice: dict[str, list[Answer]]) -> float:
    """Of the answers that had to be calls, those that were, and matched.

    Raises:
        GuardError: a call came where none may, or the model's own will made one that is no call.
    """
    if any(answer.calls for answer in by_choice["none"]):
        raise GuardError("a call came though there must be none")
    if any(not is_json(call.arguments) for answer in by_choice["auto"] for call in answer.calls):
        raise GuardError("a call of the model's own will is not JSON")
    forced = [answer for choice in FORCED for answer in by_choice[choice]]
    return sum(answer.problem is None for answer in forced) / len(forced)


def is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


@asynccontextmanager
async def processor_client() -> AsyncIterator[Client]:
    """Chapter 4's pipeline, with one engine that has the bundled model."""
    async with AsyncExitStack() as stack:
        children = stack.enter_context(Children())
        nats = await stack.enter_async_context(nats_server(children))
        etcd = await stack.enter_async_context(etcd_server(children))
        environment = server_environment(nats.url, etcd.url)
        os.environ.update(environment)
        options = Options(NAMESPACE, engines=1, port=free_port())
        chapter = await stack.enter_async_context(
            pipeline(children, environment, "chapter4", options, arguments=PATIENT)
        )
        await asyncio.wait_for(chapter.wait_ready(), READY_S)
        runtime = DistributedRuntime(asyncio.get_running_loop(), "etcd", "nats")
        stack.callback(runtime.shutdown)
        client = await runtime.endpoint(f"{NAMESPACE}.processor.process").client()
        await client.wait_for_instances()
        yield client


async def run(seeds: Sequence[int], count: int) -> list[dict[str, list[Answer]]]:
    """The answers by choice, for `count` tools of each seed."""
    found = []
    async with processor_client() as processor:
        for seed in seeds:
            requests = requests_of(tools_of(seed, count), seed)
            found.append(
                {choice: await ask_all(processor, asked) for choice, asked in requests.items()}
            )
    return found


def table(rows: list[dict[str, Any]]) -> str:
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([str(row[name]) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    args = argument_parser(__doc__).parse_args()
    seeds, count = (SEEDS[:1], 12) if args.quick else (SEEDS, 69)
    began = time.perf_counter()
    try:
        rounds = uvloop.run(run(seeds, count))
        shares = [forced_valid_share(by_choice) for by_choice in rounds]
    except GuardError as error:
        raise SystemExit(f"error: {error}") from error
    by_choice = {
        choice: [answer for found in rounds for answer in found[choice]] for choice in rounds[0]
    }
    share = forced_valid_share(by_choice)
    rows = [row(choice, answers) for choice, answers in by_choice.items()]
    problems = [
        answer.problem
        for choice in FORCED
        for answer in by_choice[choice]
        if answer.problem is not None
    ]
    print(table(rows))
    total = count * len(seeds)
    print(f"\nforced_valid_share: {share} of {total} schemas", *problems[:5], sep="\n")
    result = {
        "model": DEFAULT_MODEL,
        "schemas": total,
        "choices": rows,
        "forced_valid_share": share,
        "rounds": shares,
        "problems": problems,
        "duration_s": round(time.perf_counter() - began, 1),
    }
    write_result(args.json, result, "measured", list(seeds))


if __name__ == "__main__":
    main()
