"""The agent's loop, with a model that says what a test wants and tools of the test's own."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Literal, cast

from chapter4.agent_loop import OwnTool, Run
from chapter4.agent_model import Model
from chapter4.tool_times import ToolTimes
from chapter4.tools import ToolError, function_tool
from common.protocol import (
    AnswerReason,
    PipelineError,
    SamplingParams,
    TextOutput,
    Usage,
)
from common.protocol_agent import (
    AgentEvent,
    AgentRequest,
    Budget,
    CallDelta,
    FunctionCallItem,
    Item,
    ItemDone,
    MessageItem,
    RunEnded,
    StepEnded,
    StepStarted,
    TextDelta,
    ToolProcessRequest,
    ToolRunItem,
    ToolStarted,
)
from common.protocol_tools import FunctionTool, ToolCallDelta, ToolChoice

import pytest
from dynamo.runtime import Context

Answer = list[TextOutput] | PipelineError
ANY_TIME = cast(float, pytest.approx(0, abs=1000))


@dataclass
class ScriptedModel:
    """Gives one answer after the other, and keeps what it was asked."""

    answers: list[Answer]
    asked: list[ToolProcessRequest] = field(default_factory=list)

    async def context_length(self) -> int:
        return 2048

    async def answer(
        self, request: ToolProcessRequest, context: Context, step: str, deadline: float
    ) -> AsyncGenerator[TextOutput, None]:
        self.asked.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, PipelineError):
            raise answer
        for output in answer:
            yield output


def end(reason: AnswerReason = "stop", tokens: int = 5) -> TextOutput:
    return TextOutput(finish_reason=reason, usage=Usage(100, tokens, 64), worker_id=1)


def says(*pieces: str, reason: AnswerReason = "stop", tokens: int = 5) -> list[TextOutput]:
    return [*(TextOutput(text=piece, tokens=1) for piece in pieces), end(reason, tokens)]


def calls(*named: tuple[str, str]) -> list[TextOutput]:
    """An answer that calls tools, by name and arguments, which come in two pieces."""
    outputs = []
    for index, (name, arguments) in enumerate(named):
        head = ToolCallDelta(index, arguments[:3], f"call_{index}", name)
        outputs.append(TextOutput(tokens=1, tool_calls=[head]))
        outputs.append(TextOutput(tokens=1, tool_calls=[ToolCallDelta(index, arguments[3:])]))
    return [*outputs, end("tool_calls")]


async def double(number: int) -> int:
    """Twice the number."""
    return 2 * number


async def fails() -> str:
    """Always fails."""
    raise ToolError("it is broken")


@dataclass
class Meeting:
    """Tools that return once two of them run."""

    inside: int = 0
    met: asyncio.Event = field(default_factory=asyncio.Event)

    async def meet(self) -> str:
        """Wait for the other call."""
        self.inside += 1
        if self.inside == 2:
            self.met.set()
        await self.met.wait()
        return "met"


@dataclass
class Endless:
    """A tool that never returns, and knows whether it was cancelled."""

    begun: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: bool = False

    async def hang(self) -> str:
        """Never returns."""
        self.begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        return ""


LOOKUP = FunctionTool("lookup", "The caller's.")


def make_run(
    answers: list[Answer],
    *tools: Callable[..., object],
    history: list[Item] | None = None,
    **fields: object,
) -> tuple[Run, ScriptedModel]:
    model = ScriptedModel(answers)
    request = AgentRequest(
        model="m",
        response_id="resp_1",
        input=[MessageItem("user", "A task.")],
        **fields,  # type: ignore[arg-type]
    )
    own = {tool.name: OwnTool("builtin", tool) for tool in map(function_tool, tools)}
    run = Run(
        request,
        history or [],
        own,
        cast(Model, model),
        ToolTimes(),
        Context("resp_1"),
        "conv_1",
    )
    return run, model


async def all_events(run: Run) -> list[AgentEvent]:
    return [event async for event in run.events()]


def ended(events: list[AgentEvent]) -> RunEnded:
    last = events[-1]
    assert isinstance(last, RunEnded)
    return last


async def test_an_answer_without_tools() -> None:
    run, model = make_run([says("Hello", " you.")], instructions="Be short.")
    assert await all_events(run) == [
        StepStarted(1, 2),
        TextDelta(0, "Hello"),
        TextDelta(0, " you."),
        StepEnded(1, Usage(100, 5, 64), ANY_TIME, 1, "stop"),
        ItemDone(0, MessageItem("assistant", "Hello you.")),
        RunEnded("completed", Usage(100, 5, 64), conversation="conv_1"),
    ]
    (asked,) = model.asked
    assert asked.messages is not None
    assert [message.role for message in asked.messages] == ["system", "user"]
    assert asked.tool_choice == ToolChoice("none")
    assert asked.hints.agent_state == "answering"
    assert asked.hints.next_turn_s is None
    assert asked.hints.session == "conv_1"


async def test_a_tool_is_run_and_the_model_sees_what_it_said() -> None:
    run, model = make_run([calls(("double", '{"number": 21}')), says("It is 42.")], double)
    events = await all_events(run)
    done = ToolRunItem("call_0", "builtin", "double", '{"number": 21}', "42", step=1)
    assert [event for event in events if not isinstance(event, StepStarted | StepEnded)] == [
        CallDelta(0, '{"n', "call_0", "double", "builtin"),
        CallDelta(0, 'umber": 21}'),
        ToolStarted(0),
        ItemDone(0, done, ANY_TIME),
        TextDelta(1, "It is 42."),
        ItemDone(1, MessageItem("assistant", "It is 42.")),
        RunEnded("completed", Usage(200, 10, 128), conversation="conv_1"),
    ]
    assert run.items == [done, MessageItem("assistant", "It is 42.")]
    first, second = model.asked
    assert (first.hints.agent_state, first.hints.step) == ("planning", 1)
    assert first.hints.next_turn_s is not None
    assert second.messages is not None
    assert [message.role for message in second.messages][-2:] == ["assistant", "tool"]
    assert "42" in second.messages[-1].content


async def test_calls_of_one_step_run_at_once() -> None:
    meeting = Meeting()
    run, _ = make_run([calls(("meet", "{}"), ("meet", "{}")), says("Both.")], meeting.meet)
    assert ended(await all_events(run)).status == "completed"
    assert [item.output for item in run.items if isinstance(item, ToolRunItem)] == ["met", "met"]


async def test_a_tool_that_fails_does_not_end_the_run() -> None:
    run, model = make_run([calls(("fails", "{}")), says("Sorry.")], fails)
    assert ended(await all_events(run)).status == "completed"
    assert model.asked[1].messages is not None
    assert "it is broken" in model.asked[1].messages[-1].content


async def test_arguments_that_do_not_fit_are_told_to_the_model() -> None:
    run, _ = make_run([calls(("double", '{"number": "x"}')), says("Sorry.")], double)
    assert ended(await all_events(run)).status == "completed"
    assert isinstance(run.items[0], ToolRunItem)
    assert run.items[0].error is not None
    assert "number" in run.items[0].error


async def test_a_call_of_the_callers_function_ends_the_run_after_the_agents_own() -> None:
    run, _ = make_run(
        [calls(("lookup", "{}"), ("double", '{"number": 1}'))], double, functions=[LOOKUP]
    )
    assert ended(await all_events(run)).status == "completed"
    assert run.items == [
        FunctionCallItem("call_0", "lookup", "{}", step=1),
        ToolRunItem("call_1", "builtin", "double", '{"number": 1}', "2", step=1),
    ]


async def test_the_plan_comes_first_then_the_callers_choice_then_the_models() -> None:
    call = calls(("double", '{"number": 1}'))
    run, model = make_run(
        [call, call, call, says("Done.")],
        double,
        fails,
        plan=["double", "fails"],
        tool_choice=ToolChoice("required"),
    )
    await all_events(run)
    assert [asked.tool_choice for asked in model.asked] == [
        ToolChoice("required", "double"),
        ToolChoice("required", "fails"),
        ToolChoice("required"),
        ToolChoice(),
    ]
    assert [asked.hints.agent_state for asked in model.asked] == [
        *("calling", "calling", "calling"),
        "planning",
    ]


async def test_the_last_step_of_the_budget_answers() -> None:
    call = calls(("double", '{"number": 1}'))
    run, model = make_run([call, call, says("Enough.")], double, budget=Budget(steps=3))
    assert ended(await all_events(run)).status == "completed"
    assert model.asked[-1].tool_choice == ToolChoice("none")


async def test_no_more_tools_are_run_than_the_budget_has() -> None:
    call = calls(("double", '{"number": 1}'), ("double", '{"number": 2}'))
    run, model = make_run([call, call, says("Ok.")], double, budget=Budget(tool_calls=3))
    assert ended(await all_events(run)).status == "completed"
    made = [item for item in run.items if isinstance(item, ToolRunItem)]
    assert [item.output for item in made] == ["2", "4", "2", ""]
    assert made[-1].error is not None
    assert "limit of tool calls" in made[-1].error
    assert model.asked[-1].tool_choice == ToolChoice("none")


async def test_the_token_budget_is_that_of_all_steps() -> None:
    call = calls(("double", '{"number": 1}'))
    run, model = make_run(
        [call, says("Cut", reason="length", tokens=7)], double, budget=Budget(output_tokens=12)
    )
    last = ended(await all_events(run))
    assert (last.status, last.reason) == ("incomplete", "max_output_tokens")
    assert [asked.sampling.max_tokens for asked in model.asked] == [12, 7]
    assert run.items[-1] == MessageItem("assistant", "Cut")


async def test_a_call_that_was_cut_off_is_not_run() -> None:
    cut = [*calls(("double", '{"number": 1}'))[:1], end("length")]
    run, _ = make_run([cut], double)
    events = await all_events(run)
    assert ended(events).reason == "max_output_tokens"
    assert not any(isinstance(event, ToolStarted | ItemDone) for event in events)
    assert run.items == []


async def test_an_answer_with_a_schema_comes_after_a_draft_that_nobody_sees() -> None:
    schema = '{"type": "object"}'
    run, model = make_run(
        [calls(("double", '{"number": 1}')), says("Hm, it is 2."), says('{"n": 2}')],
        double,
        sampling=SamplingParams(json_schema=schema),
    )
    events = await all_events(run)
    assert [event.text for event in events if isinstance(event, TextDelta)] == ['{"n": 2}']
    assert run.items[-1] == MessageItem("assistant", '{"n": 2}')
    assert [asked.sampling.json_schema for asked in model.asked] == [None, None, schema]
    assert model.asked[-1].tool_choice == ToolChoice("none")


async def test_a_stop_reaches_a_tool_at_work() -> None:
    endless = Endless()
    run, _ = make_run([calls(("hang", "{}"))], endless.hang)

    async def stop() -> None:
        await endless.begun.wait()
        run.context.stop_generating()

    events, _ = await asyncio.gather(all_events(run), stop())
    assert endless.cancelled
    assert ended(events).reason == "cancelled"


async def test_a_run_ends_in_time() -> None:
    endless = Endless()
    run, _ = make_run([calls(("hang", "{}"))], endless.hang, budget=Budget(seconds=0.2))
    assert ended(await all_events(run)).reason == "timeout"
    assert endless.cancelled == endless.begun.is_set()


async def test_a_prompt_that_turns_out_too_long_is_made_shorter() -> None:
    said: list[Item] = []
    for number in range(40):
        said += [MessageItem("user", f"{number} " + "word " * 20), MessageItem("assistant", "Yes.")]
    too_long = PipelineError("invalid_request", "the prompt has 9999 tokens", "token_ids")
    run, model = make_run([too_long, says("Fine.")], history=said)
    events = await all_events(run)
    assert ended(events).status == "completed"
    assert sum(isinstance(event, StepStarted) for event in events) == 1
    sizes = [len(asked.messages or []) for asked in model.asked]
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize("kind", ["overloaded", "unavailable"])
async def test_a_step_in_the_midst_of_a_run_is_tried_again(
    kind: Literal["overloaded", "unavailable"],
) -> None:
    """What the tools did is not lost because of a moment's load; the first step is the caller's."""
    busy = PipelineError(kind, "try later", retry_after_s=0.01)
    run, _ = make_run([calls(("double", '{"number": 1}')), busy, busy, says("2")], double)
    assert ended(await all_events(run)).status == "completed"
    run, _ = make_run([busy, says("2")], double)
    with pytest.raises(PipelineError, match="try later"):
        await all_events(run)


async def test_no_time_is_left_to_try_again() -> None:
    busy = PipelineError("overloaded", "try later", retry_after_s=1000)
    run, _ = make_run([calls(("double", '{"number": 1}')), busy], double)
    with pytest.raises(PipelineError, match="try later"):
        await all_events(run)


async def test_other_refusals_end_the_run() -> None:
    run, _ = make_run([PipelineError("invalid_request", "no", "temperature")])
    with pytest.raises(PipelineError, match="no"):
        await all_events(run)


async def test_tools_leave_less_room_for_the_past_and_nothing_else_does() -> None:
    said: list[Item] = []
    for number in range(12):
        said += [MessageItem("user", f"{number} " + "word " * 20), MessageItem("assistant", "Yes.")]
    big = FunctionTool("big", "x" * 2800)
    sizes = {}
    for tools in ((), (big,)):
        run, model = make_run([says("Fine.")], history=said, functions=list(tools))
        await all_events(run)
        sizes[len(tools)] = len(model.asked[0].messages or [])
    assert sizes[0] == 25
    assert sizes[1] < 20


async def test_items_are_kept_in_the_order_of_their_output() -> None:
    outputs = calls(("double", '{"number": 1}'))
    text = TextOutput(text="So.", tokens=1)
    run, _ = make_run([[*outputs[:-1], text, outputs[-1]], says("2")], double)
    events = await all_events(run)
    told = sorted(event.index for event in events if isinstance(event, ItemDone))
    assert told == [0, 1, 2]
    kinds = [type(item) for item in run.items]
    assert kinds == [ToolRunItem, MessageItem, MessageItem]


async def test_an_answer_that_ends_by_itself_at_the_limit_is_complete() -> None:
    run, _ = make_run([says("Done.", tokens=5)], budget=Budget(output_tokens=5))
    assert ended(await all_events(run)).status == "completed"
