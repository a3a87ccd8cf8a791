"""The objects of POST /v1/responses that a response consists of.

Source: https://platform.openai.com/docs/api-reference/responses/object. Members that this server
has no use for are left out where they may be. `nvext` is Dynamo's extension.
"""

from typing import Any, Literal

from common.protocol import ErrorInfo, Usage
from common.protocol_agent import StepEnded

import msgspec
from msgspec import UNSET, UnsetType

ItemStatus = Literal["in_progress", "completed", "incomplete", "failed"]
ResponseStatus = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputText(msgspec.Struct, tag="output_text", tag_field="type"):
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


class OutputMessage(msgspec.Struct, tag="message", tag_field="type"):
    id: str
    status: ItemStatus
    role: Literal["assistant"] = "assistant"
    content: list[OutputText] = []


class OutputFunctionCall(msgspec.Struct, tag="function_call", tag_field="type"):
    id: str
    call_id: str
    name: str
    status: ItemStatus
    arguments: str = ""


class McpExecutionError(msgspec.Struct, tag="mcp_tool_execution_error", tag_field="type"):
    content: str


class OutputMcpCall(msgspec.Struct, tag="mcp_call", tag_field="type"):
    id: str
    server_label: str
    name: str
    status: ItemStatus
    arguments: str = ""
    approval_request_id: None = None
    output: str | None = None
    error: McpExecutionError | None = None


class Logs(msgspec.Struct, tag="logs", tag_field="type"):
    logs: str


class OutputCodeCall(msgspec.Struct, tag="code_interpreter_call", tag_field="type"):
    """The outputs are null unless the request includes them."""

    id: str
    container_id: str
    status: ItemStatus
    code: str | None = None
    outputs: list[Logs] | None = None


class SearchResult(msgspec.Struct):
    text: str


class OutputSearchCall(msgspec.Struct, tag="file_search_call", tag_field="type"):
    """The results are null unless the request includes them."""

    id: str
    status: ItemStatus
    queries: list[str] = []
    results: list[SearchResult] | None = None


OutputItem = OutputMessage | OutputFunctionCall | OutputMcpCall | OutputCodeCall | OutputSearchCall


class InputDetails(msgspec.Struct):
    cached_tokens: int
    cache_write_tokens: int = 0


class OutputDetails(msgspec.Struct):
    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct):
    """Of all steps of the run together."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponseError(msgspec.Struct):
    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str
    param: str | None = None


class IncompleteDetails(msgspec.Struct):
    """The budget that was used up: OpenAI's `max_output_tokens`, or `timeout`."""

    reason: str


class ConversationObject(msgspec.Struct):
    id: str


class RunExtension(msgspec.Struct):
    """What was asked for with `nvext.extra_fields`: what each step of the run took."""

    steps: list[StepEnded]


class Asked(msgspec.Struct):
    """The members of a response that repeat the request, or the defaults."""

    created_at: int
    metadata: dict[str, str]
    parallel_tool_calls: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float
    max_output_tokens: int | None
    max_tool_calls: int | None
    safety_identifier: str | None
    user: str | None
    store: bool
    truncation: Literal["auto", "disabled"] = "auto"
    background: Literal[False] = False
    include: list[str] = []


class ResponseObject(Asked, kw_only=True):
    """A response; `conversation` can be gone on with, if the response is stored."""

    id: str
    object: Literal["response"] = "response"
    status: ResponseStatus
    model: str
    output: list[OutputItem] = []
    completed_at: int | None = None
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: ConversationObject | None = None
    reasoning: None = None
    usage: ResponseUsage | None = None
    nvext: RunExtension | UnsetType = UNSET


def response_usage(usage: Usage) -> ResponseUsage:
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputDetails(usage.cached_tokens),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputDetails(),
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
    )


def response_error(info: ErrorInfo) -> ResponseError:
    """The failure in one of the words that OpenAI's API has for it."""
    if info.kind == "overloaded":
        return ResponseError("rate_limit_exceeded", info.message, info.param)
    if info.kind in ("invalid_request", "too_large", "model_not_found", "not_found"):
        return ResponseError("invalid_prompt", info.message, info.param)
    return ResponseError("server_error", info.message, info.param)
