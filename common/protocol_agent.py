"""Messages of an agent: a task in, its steps and the answer out.

    frontend --AgentRequest--> agent --ToolProcessRequest--> processor
    frontend <--AgentEvent---- agent <--TextOutput---------- processor

Items are those of OpenAI's Responses API, with one kind for all that the agent itself runs:
https://platform.openai.com/docs/api-reference/responses.
"""

from typing import Any, Literal

from common.protocol import AnswerReason, ErrorInfo, SamplingParams, Usage
from common.protocol_routing import RoutedProcessRequest, RoutingHints
from common.protocol_tools import FunctionTool, ToolChoice

import msgspec


class ToolProcessRequest(RoutedProcessRequest, omit_defaults=True, forbid_unknown_fields=True):
    """The input of `processor.process` where the model may call tools.

    With `cut_to_room`, a `max_tokens` that the context has no room for is no error, but cut.
    """

    tools: list[FunctionTool] = msgspec.field(default_factory=list)
    tool_choice: ToolChoice = msgspec.field(default_factory=ToolChoice)
    parallel_tool_calls: bool = True
    cut_to_room: bool = False


class MessageItem(msgspec.Struct, tag="message", tag_field="type", omit_defaults=True):
    """Something said."""

    role: Literal["system", "user", "assistant"]
    content: str


class FunctionCallItem(msgspec.Struct, tag="function_call", tag_field="type", omit_defaults=True):
    """A call of one of the caller's functions, which the caller runs.

    Calls of the same `step` were made at once.
    """

    call_id: str
    name: str
    arguments: str
    step: int = 0


class FunctionOutputItem(
    msgspec.Struct, tag="function_call_output", tag_field="type", omit_defaults=True
):
    """What the caller's function returned."""

    call_id: str
    output: str


class ToolRunItem(msgspec.Struct, tag="tool_run", tag_field="type", omit_defaults=True):
    """A call that the agent ran, of a tool of the set `server`; `error` says why it failed.

    The model has seen `output`, or `error`.
    """

    call_id: str
    server: str
    name: str
    arguments: str
    output: str = ""
    error: str | None = None
    step: int = 0


Item = MessageItem | FunctionCallItem | FunctionOutputItem | ToolRunItem


class ToolSet(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """Tools that the agent runs: `builtin`, or those of an MCP server that it was started with.

    `allowed` names some of them; None: all.
    """

    server: str
    allowed: list[str] | None = None


class Budget(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """When a run ends at the latest. A step is one answer of the model."""

    steps: int = 8
    tool_calls: int = 16
    seconds: float = 120.0
    output_tokens: int = 4096


class AgentRequest(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """The input of `agent.run`: a task, what may be used for it, and the session it belongs to.

    `previous_response_id` or `conversation` names what was said before. `functions` are the
    caller's: a call of one ends the run. `plan` names tools that the first steps must call, in
    this order; after them `tool_choice` holds for one step, and then the model is free.
    `sampling.json_schema` is for the final answer. Without `truncation` a run fails whose past and
    input are too long for the model; else the oldest go. With `store` the run can be continued, and
    what of the HTTP response only the request says, `document`, is kept with it.
    """

    model: str
    response_id: str
    input: list[Item]
    instructions: str = ""
    previous_response_id: str | None = None
    conversation: str | None = None
    functions: list[FunctionTool] = []
    toolsets: list[ToolSet] = []
    tool_choice: ToolChoice = msgspec.field(default_factory=ToolChoice)
    parallel_tool_calls: bool = True
    plan: list[str] = []
    sampling: SamplingParams = msgspec.field(default_factory=SamplingParams)
    budget: Budget = msgspec.field(default_factory=Budget)
    truncation: Literal["auto", "disabled"] = "auto"
    store: bool = True
    user: str = ""
    hints: RoutingHints = msgspec.field(default_factory=RoutingHints)
    document: dict[str, Any] = {}


class StepStarted(msgspec.Struct, tag="step_started", tag_field="event", omit_defaults=True):
    """The model is asked for the `step`-th time."""

    step: int
    prompt_items: int


class TextDelta(msgspec.Struct, tag="text", tag_field="event", omit_defaults=True):
    """A piece of the message that is the run's output item number `index`."""

    index: int
    text: str


class CallDelta(msgspec.Struct, tag="call", tag_field="event", omit_defaults=True):
    """A piece of a call; its first has `call_id`, `name` and, of the agent's tools, `server`."""

    index: int
    arguments: str = ""
    call_id: str | None = None
    name: str | None = None
    server: str | None = None


class ToolStarted(msgspec.Struct, tag="tool_started", tag_field="event", omit_defaults=True):
    """The agent runs the call that is output item number `index`."""

    index: int


class ItemDone(msgspec.Struct, tag="item_done", tag_field="event", omit_defaults=True):
    """Output item number `index` is complete; `seconds` is what its tool took."""

    index: int
    item: Item
    seconds: float = 0.0


class StepEnded(msgspec.Struct, tag="step_ended", tag_field="event", omit_defaults=True):
    """What the step took: its tokens, its time to the first one, and the engine that gave them."""

    step: int
    usage: Usage
    ttft_ms: float
    worker_id: int | None = None
    finish_reason: AnswerReason | None = None


class RunEnded(msgspec.Struct, tag="run_ended", tag_field="event", omit_defaults=True):
    """The last event. `incomplete` has a `reason`: the budget that was used up, or `cancelled`.

    `usage` is the sum of the steps'.
    """

    status: Literal["completed", "incomplete", "failed"]
    usage: Usage
    reason: str | None = None
    error: ErrorInfo | None = None
    conversation: str | None = None


AgentEvent = StepStarted | TextDelta | CallDelta | ToolStarted | ItemDone | StepEnded | RunEnded


class StoredQuery(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """What is stored under an id, of this user if one is named.

    The input of `agent.get_response`, `agent.delete_response`, `agent.get_conversation`,
    `agent.get_turns` and `agent.delete_conversation`.
    """

    id: str
    user: str | None = None


class StoredResponse(msgspec.Struct, omit_defaults=True):
    """One turn: what was asked and what the agent made of it. `created` is in Unix seconds."""

    id: str
    session: str
    created: int
    model: str
    status: Literal["completed", "incomplete", "failed"]
    usage: Usage
    input: list[Item]
    output: list[Item]
    instructions: str = ""
    previous_response_id: str | None = None
    conversation: str | None = None
    reason: str | None = None
    error: ErrorInfo | None = None
    user: str = ""
    document: dict[str, Any] = {}


class NewConversation(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """The input of `agent.create_conversation`."""

    user: str = ""
    metadata: dict[str, str] = {}


class StoredConversation(msgspec.Struct, omit_defaults=True):
    """A session; `created` is in Unix seconds."""

    id: str
    created: int
    metadata: dict[str, str] = {}


class StoredOutput(msgspec.Struct, omit_defaults=True):
    """An answer about what is stored: a response or a conversation, or the error.

    To a query of `agent.get_turns` each turn is an answer, and the conversation the last one.
    """

    response: StoredResponse | None = None
    conversation: StoredConversation | None = None
    error: ErrorInfo | None = None
