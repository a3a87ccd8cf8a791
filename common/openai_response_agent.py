"""A request of POST /v1/responses as the agent takes it, and what its response repeats of it."""

from typing import Any

from common.openai_response_objects import Asked
from common.openai_response_requests import AgentNvext, ResponseRequest
from common.openai_response_tools import ResponseFunction
from common.protocol import SamplingParams
from common.protocol_agent import AgentRequest, Budget, FunctionCallItem, Item, ToolRunItem
from common.protocol_routing import RoutingHints
from common.protocol_tools import ToolChoice

import msgspec


def response_id_of(request_id: str) -> str:
    """The id of the response to the HTTP request of that id."""
    return f"resp_{request_id}"


def to_agent_request(
    request: ResponseRequest, response_id: str, asked: Asked, hints: RoutingHints
) -> AgentRequest:
    """The request as the agent takes it; what `asked` says is stored with the response."""
    tools = request.tools or []
    nvext = request.nvext or AgentNvext()
    default = Budget()
    return AgentRequest(
        model=request.model,
        response_id=response_id,
        input=_with_steps([item.item() for item in request.input]),
        instructions=request.instructions or "",
        previous_response_id=request.previous_response_id,
        conversation=request.conversation.id if request.conversation else None,
        functions=[tool.tool() for tool in tools if isinstance(tool, ResponseFunction)],
        toolsets=[tool.toolset() for tool in tools if not isinstance(tool, ResponseFunction)],
        tool_choice=request.tool_choice.choice() if request.tool_choice else ToolChoice(),
        parallel_tool_calls=asked.parallel_tool_calls,
        plan=nvext.tool_plan or [],
        sampling=_sampling(request),
        budget=Budget(
            steps=nvext.max_steps or default.steps,
            tool_calls=request.max_tool_calls or default.tool_calls,
            seconds=nvext.timeout_s or default.seconds,
            output_tokens=request.max_output_tokens or default.output_tokens,
        ),
        truncation=asked.truncation,
        store=asked.store,
        user=request.user or request.safety_identifier or "",
        hints=hints,
        document=msgspec.to_builtins(asked),
    )


def asked_of(request: ResponseRequest, created: int) -> Asked:
    """What the response repeats; `created` is in seconds since 1970."""
    choice: str | dict[str, Any] = "auto"
    if request.tool_choice is not None:
        members = request.tool_choice.model_dump(exclude_none=True)
        choice = members if len(members) > 1 else request.tool_choice.type
    if choice in ("code_interpreter", "file_search"):
        choice = {"type": choice}
    text = request.text.model_dump(by_alias=True, exclude_none=True) if request.text else {}
    return Asked(
        created_at=created,
        metadata=request.metadata or {},
        parallel_tool_calls=request.parallel_tool_calls is not False,
        temperature=1.0 if request.temperature is None else request.temperature,
        text={"format": {"type": "text"}, **text},
        tool_choice=choice,
        tools=[tool.model_dump(exclude_none=True) for tool in request.tools or []],
        top_p=1.0 if request.top_p is None else request.top_p,
        max_output_tokens=request.max_output_tokens,
        max_tool_calls=request.max_tool_calls,
        safety_identifier=request.safety_identifier,
        user=request.user,
        store=request.store is not False,
        truncation=request.truncation or "auto",
        include=list(request.include or []),
    )


def _with_steps(items: list[Item]) -> list[Item]:
    """Calls that a client sends back do not say which were made at once.

    Of its functions, those that stand together were; of the agent's tools, each may have had the
    output of the one before.
    """
    step = 0
    before: Item | None = None
    for item in items:
        if isinstance(item, FunctionCallItem | ToolRunItem):
            together = isinstance(item, FunctionCallItem) and isinstance(before, FunctionCallItem)
            step += not together
            item.step = step
        before = item
    return items


def _sampling(request: ResponseRequest) -> SamplingParams:
    temperature = 1.0 if request.temperature is None else request.temperature
    top_p = 1.0 if request.top_p is None else request.top_p
    if top_p == 0:  # the smallest set of tokens that may be chosen: the most likely one
        temperature, top_p = 0.0, 1.0
    text_format = request.text.format if request.text else None
    schema = text_format.schema_text() if text_format else None
    return SamplingParams(temperature=temperature, top_p=top_p, json_schema=schema)
