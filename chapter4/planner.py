"""The planner component: splits a task into steps, and has agents do them one after the other.

To its callers it is an agent: the same messages, from another endpoint, `planner.run`. To the
agents it is a caller like the frontend.
"""

import argparse
import time
from collections.abc import AsyncGenerator
from typing import Any

from chapter4.agent_client import ask_agent
from chapter4.item_messages import TOOL_OUTPUT_RULE, as_data
from common.protocol import PipelineError, Usage, from_wire, to_wire
from common.protocol_agent import (
    AgentEvent,
    AgentRequest,
    Budget,
    CallDelta,
    ItemDone,
    MessageItem,
    RunEnded,
    StepEnded,
    TextDelta,
    ToolRunItem,
    ToolStarted,
)
from common.protocol_tools import ToolChoice
from common.telemetry import request_log
from common.waiting import linked_child
from common.worker import Lifecycle, add_common_arguments, run

import msgspec
from dynamo.runtime import Client, Context, DistributedRuntime, dynamo_worker
from msgspec.structs import replace

MAX_STEPS = 3
PLAN = "Split the task into one to three short steps, each of which can be done by itself."
ANSWER = "Answer the task with these results."
PLAN_SCHEMA = {
    "type": "object",
    "properties": {
        "steps": {
            "type": "array",
            "items": {"type": "string", "minLength": 1, "maxLength": 200},
            "minItems": 1,
            "maxItems": MAX_STEPS,
        }
    },
    "required": ["steps"],
    "additionalProperties": False,
}


@dynamo_worker()
async def worker(runtime: DistributedRuntime, args: argparse.Namespace, life: Lifecycle) -> None:
    agent = await runtime.endpoint(f"{args.namespace}.agent.run").client()

    async def run_planner(request: Any, context: Context) -> AsyncGenerator[dict[str, Any], None]:
        total = Usage(0, 0)
        try:
            wanted = from_wire(request, AgentRequest)
            if wanted.functions:
                message = "The planner calls no functions of its caller; ask the agent."
                raise PipelineError("invalid_request", message, "tools")
            if wanted.conversation is not None:
                message = "The planner's runs share no claim; go on with previous_response_id."
                raise PipelineError("invalid_request", message, "conversation")
            async for event in planned(wanted, Parts(agent, wanted, total, context)):
                yield to_wire(event)
        except PipelineError as error:
            request_log(context.id()).warning("failed: %s", error)
            yield to_wire(RunEnded("failed", total, error=error.info))

    await life.serve(runtime, {f"{args.namespace}.planner.run": run_planner})


async def planned(request: AgentRequest, parts: "Parts") -> AsyncGenerator[AgentEvent, None]:
    """The plan, its steps and the answer: a run of an agent each."""
    async for event in parts.run(plan_request(request)):
        yield event
    if parts.ended.status == "completed":
        results: list[str] = []
        for step in msgspec.json.decode(parts.said)["steps"]:
            async for event in parts.run(step_request(request, step, results)):
                yield event
            if parts.ended.status != "completed":
                break
            results.append(f"{step}\n{parts.said}")
        else:
            async for event in parts.run(answer_request(request, results)):
                yield event
    yield parts.ended


class Parts:
    """Runs of agents one after the other, told as one."""

    def __init__(
        self, agent: Client, request: AgentRequest, total: Usage, context: Context
    ) -> None:
        self.ended = RunEnded("incomplete", total)
        self.said = ""  # the last message of the last run
        self._agent = agent
        self._context = context
        self._deadline = time.monotonic() + request.budget.seconds
        self._runs = self._steps = self._calls = 0
        self._told = 0  # output items of the runs before

    async def run(self, part: AgentRequest) -> AsyncGenerator[AgentEvent, None]:
        """All events but the last one, which is in `ended`; raises as `run_agent` does."""
        self.said, items, total = "", 0, self.ended.usage
        seconds = max(self._deadline - time.monotonic(), 0.0)
        left = Budget(
            steps=max(part.budget.steps - self._steps, len(part.plan) + 2),
            tool_calls=max(part.budget.tool_calls - self._calls, 0),
            seconds=seconds,
            output_tokens=max(part.budget.output_tokens - total.completion_tokens, 1),
        )
        part = replace(part, budget=left)
        self._runs += 1
        async with linked_child(self._context, f"{self._context.id()}-run{self._runs}") as context:
            async for event in ask_agent(self._agent, part, SameNames(), context):
                if isinstance(event, RunEnded):
                    total.prompt_tokens += event.usage.prompt_tokens
                    total.completion_tokens += event.usage.completion_tokens
                    total.cached_tokens += event.usage.cached_tokens
                    self.ended = replace(event, usage=total)
                    continue
                if isinstance(event, TextDelta | CallDelta | ToolStarted | ItemDone):
                    items = max(items, event.index + 1)
                    event = replace(event, index=event.index + self._told)
                self._steps += isinstance(event, StepEnded)
                if isinstance(event, ItemDone) and isinstance(event.item, MessageItem):
                    self.said = event.item.content
                elif isinstance(event, ItemDone) and isinstance(event.item, ToolRunItem):
                    self._calls += 1
                yield event
        self._told += items


class SameNames:
    """What agents complain of, the frontend puts into its client's words."""

    def field_names(self) -> dict[str, str]:
        return {}


def plan_request(request: AgentRequest) -> AgentRequest:
    """What was said before counts for the plan; the plan itself is not remembered."""
    schema = msgspec.json.encode(PLAN_SCHEMA).decode()
    return replace(
        request,
        response_id=f"{request.response_id}-plan",
        instructions="\n".join(filter(None, (request.instructions, PLAN))),
        toolsets=[],
        tool_choice=ToolChoice(),
        plan=[],
        sampling=replace(request.sampling, json_schema=schema),
        store=False,
    )


def step_request(request: AgentRequest, step: str, results: list[str]) -> AgentRequest:
    """One step, by itself but for what the steps before it came to."""
    found = as_data("\n".join(results))  # what a document said may be in it
    known = [MessageItem("user", f"Known so far:\n{found}")] if results else []
    return replace(
        request,
        response_id=f"{request.response_id}-{len(results) + 1}",
        input=[*known, MessageItem("user", step)],
        previous_response_id=None,
        instructions=with_rule(request.instructions),
        tool_choice=ToolChoice() if results else request.tool_choice,
        plan=[] if results else request.plan,
        sampling=replace(request.sampling, json_schema=None),
        store=False,
    )


def answer_request(request: AgentRequest, results: list[str]) -> AgentRequest:
    """The answer to the caller, in the form that he asked for; it is what the session remembers."""
    found = MessageItem("assistant", as_data("\n\n".join(results)))
    return replace(
        request,
        instructions=with_rule(request.instructions),
        input=[*request.input, found, MessageItem("user", ANSWER)],
        toolsets=[],
        tool_choice=ToolChoice(),
        plan=[],
    )


def with_rule(instructions: str) -> str:
    return "\n".join(filter(None, (instructions, TOOL_OUTPUT_RULE)))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    run(worker, parse_args(), "planner")
