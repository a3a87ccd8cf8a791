"""The loop of an agent: ask the model, run the tools it calls, show it what they say, answer."""

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field

from chapter4.agent_calls import run_calls
from chapter4.agent_model import Model, TokenEstimate
from chapter4.agent_step import Step
from chapter4.history import fit, messages_of
from chapter4.run_tool import ToolResult, run_tool
from chapter4.tool_times import ToolTimes
from chapter4.tools import Tool, ToolContext
from common.protocol import AnswerReason, ErrorInfo, PipelineError, Usage
from common.protocol_agent import (
    AgentEvent,
    AgentRequest,
    FunctionCallItem,
    Item,
    ItemDone,
    MessageItem,
    RunEnded,
    StepEnded,
    StepStarted,
    ToolProcessRequest,
    ToolRunItem,
)
from common.protocol_routing import AgentState
from common.protocol_tools import FunctionTool, ToolChoice
from common.waiting import stopped_within

from dynamo.runtime import Context
from msgspec.structs import replace

ANSWER_SHARE = 0.25  # of the context length is kept free for the answer
MAX_RETRIES = 3
BACKOFF_S = 0.5
ANSWER = ToolChoice("none")


@dataclass(frozen=True)
class OwnTool:
    """A tool that the agent runs, and the set it is of."""

    server: str
    tool: Tool


@dataclass
class Run:
    """One run: what was said before, what may be used, and what has been made so far.

    With tools and a JSON schema for the answer, the model first answers freely, in a draft that
    nobody sees; when that calls no tool any more, it is asked again, with the schema. The last
    step of the budget has no tools, so that it is an answer.
    """

    request: AgentRequest
    history: list[Item]
    tools: Mapping[str, OwnTool]
    model: Model
    times: ToolTimes
    context: Context
    session: str
    items: list[Item] = field(default_factory=list)
    usage: Usage = field(default_factory=lambda: Usage(0, 0))
    _calls: int = 0
    _estimate: TokenEstimate = field(default_factory=TokenEstimate)

    async def events(self) -> AsyncGenerator[AgentEvent, None]:
        """All that happens; the last event is `RunEnded`.

        Raises:
            PipelineError: the model cannot be asked.
        """
        budget = self.request.budget
        deadline = time.monotonic() + budget.seconds
        answer_now = False
        for number in range(1, budget.steps + 1):
            choice = ANSWER if answer_now or number == budget.steps else self._choice(number)
            draft = choice != ANSWER and self.request.sampling.json_schema is not None
            servers = {name: own.server for name, own in self.tools.items()}
            step = Step(number, len(self.items), servers, draft=draft)
            finish: AnswerReason | None = None
            async with aclosing(self._ask(step, number, choice, deadline)) as events:
                async for event in events:
                    if isinstance(event, StepEnded):
                        finish = event.finish_reason
                    yield event
            made: dict[int, Item] = {}
            if (said := step.message()) is not None:
                made[said.index] = said.item
                yield said
            if self._over(deadline, finish) is None:  # else calls may have been cut off
                made |= step.calls
                run = self._run_tool(deadline)
                most = self._calls_left()
                async with aclosing(run_calls(step.calls, run, most, self.context)) as events:
                    async for event in events:
                        if isinstance(event, ItemDone) and isinstance(event.item, ToolRunItem):
                            self._calls += 1
                            self.times.add(event.seconds)
                        yield event
            self.items += [made[index] for index in sorted(made)]
            reason = self._over(deadline, finish, goes_on=draft or bool(step.calls))
            if reason is not None:
                yield self._ended(reason)
                return
            if any(isinstance(call, FunctionCallItem) for call in step.calls.values()):
                break  # the caller goes on
            if not step.calls and not draft:
                break
            answer_now = not step.calls
        yield self._ended(None)

    def _ended(self, reason: str | None) -> RunEnded:
        return RunEnded(
            "completed" if reason is None else "incomplete",
            self.usage,
            reason,
            conversation=self.session,
        )

    def _over(
        self, deadline: float, finish: AnswerReason | None, *, goes_on: bool = False
    ) -> str | None:
        """Why the run cannot go on, if it cannot."""
        if self.context.is_stopped():
            return "cancelled"
        if time.monotonic() >= deadline:
            return "timeout"
        used_up = self.usage.completion_tokens >= self.request.budget.output_tokens
        return "max_output_tokens" if finish == "length" or (used_up and goes_on) else None

    def _choice(self, number: int) -> ToolChoice:
        plan = self.request.plan
        if not (self.tools or self.request.functions) or not self._calls_left():
            return ANSWER
        if number <= len(plan):
            return ToolChoice("required", plan[number - 1])
        return self.request.tool_choice if number == len(plan) + 1 else ToolChoice()

    def _calls_left(self) -> int:
        return max(self.request.budget.tool_calls - self._calls, 0)

    def _run_tool(self, deadline: float) -> Callable[[ToolRunItem], Awaitable[ToolResult]]:
        context = ToolContext(self.request.user, self.session)

        async def run(call: ToolRunItem) -> ToolResult:
            tool = self.tools[call.name].tool
            return await run_tool(tool, call.arguments, context, deadline=deadline)

        return run

    async def _ask(
        self, step: Step, number: int, choice: ToolChoice, deadline: float
    ) -> AsyncGenerator[AgentEvent, None]:
        """One answer of the model, with as much of the past as the context has room for."""
        window = round(await self.model.context_length() * (1 - ANSWER_SHARE))
        own = (_function(own.tool) for own in self.tools.values())
        tools = [*self.request.functions, *own]
        for attempt in range(MAX_RETRIES + 1):
            kept = self._kept(window - self._estimate.count_tools(tools))
            wanted = self._wanted(kept, tools, number, choice)
            if attempt == 0:
                yield StepStarted(number, len(kept))
            started, ttft_ms = time.perf_counter(), 0.0
            try:
                answer = self.model.answer(wanted, self.context, f"{number}.{attempt}", deadline)
                async with aclosing(answer) as outputs:
                    async for output in outputs:
                        if output.tokens:
                            ttft_ms = ttft_ms or (time.perf_counter() - started) * 1e3
                        for event in step.push(output):
                            yield event
                        if (usage := output.usage) is not None:
                            self._add(usage)
                            finish, worker = output.finish_reason, output.worker_id
                            yield StepEnded(number, usage, ttft_ms, worker, finish)
                return
            except PipelineError as error:
                if attempt == MAX_RETRIES or ttft_ms:
                    raise
                if not await self._is_to_ask_again(error.info, number, attempt, deadline):
                    raise

    async def _is_to_ask_again(
        self, error: ErrorInfo, number: int, attempt: int, deadline: float
    ) -> bool:
        """Whether another try may help; has the prompt be shorter, or waits, for it.

        What hinders the first step is told to the caller: nothing has been done yet.
        """
        if error.kind == "invalid_request" and error.param == "token_ids":
            self._estimate.too_low()
            return self.request.truncation == "auto"
        wait_s = error.retry_after_s or BACKOFF_S * 2**attempt
        passes = error.kind in ("overloaded", "unavailable") and number > 1
        if not passes or time.monotonic() + wait_s >= deadline:
            return False
        await stopped_within(self.context, wait_s)
        return not self.context.is_stopped()

    def _kept(self, window: int) -> list[Item]:
        """What of all that was said the model is shown."""
        text = self.request.instructions
        past = [*([MessageItem("system", text)] if text else []), *self.history]
        new = [*self.request.input, *self.items]
        if self.request.truncation == "disabled":
            return [*past, *new]
        return fit(past, new, window_tokens=window, count=self._estimate.count)

    def _wanted(
        self, kept: list[Item], tools: list[FunctionTool], number: int, choice: ToolChoice
    ) -> ToolProcessRequest:
        request = self.request
        answers = choice == ANSWER
        at_work: AgentState = "calling" if choice.mode == "required" else "planning"
        left = request.budget.output_tokens - self.usage.completion_tokens
        return ToolProcessRequest(
            model=request.model,
            messages=messages_of(kept, tools=bool(tools)),
            sampling=replace(
                request.sampling,
                max_tokens=min(request.sampling.max_tokens or left, left),
                json_schema=request.sampling.json_schema if answers else None,
            ),
            hints=replace(
                request.hints,
                session=request.hints.session or self.session,
                agent_state="answering" if answers else at_work,
                next_turn_s=None if answers else self.times.expected_s(),
                step=number,
            ),
            tools=tools,
            tool_choice=choice,
            parallel_tool_calls=request.parallel_tool_calls,
            cut_to_room=True,
        )

    def _add(self, usage: Usage) -> None:
        self.usage.prompt_tokens += usage.prompt_tokens
        self.usage.completion_tokens += usage.completion_tokens
        self.usage.cached_tokens += usage.cached_tokens


def _function(tool: Tool) -> FunctionTool:
    return FunctionTool(tool.name, tool.description, tool.parameters)
