"""The items of a request to POST /v1/responses: what was said, called and returned.

A client may send back every item that a response had. Source:
https://platform.openai.com/docs/api-reference/responses/create.
"""

import json
from typing import Annotated, Any, Literal

from common.openai_fields import TAG, StrictModel, by_type
from common.openai_response_tools import BUILTIN, DOCUMENTS_TOOL, PYTHON_TOOL, ServerLabel
from common.openai_response_unsupported import (
    FUNCTION_CALL,
    FUNCTION_OUTPUT,
    MCP_CALL,
    OUTPUT_TEXT,
    SEARCH_RESULT,
)
from common.openai_tool_messages import Parsed, json_object
from common.openai_values import FunctionName, Label
from common.protocol_agent import (
    FunctionCallItem,
    FunctionOutputItem,
    Item,
    MessageItem,
    ToolRunItem,
)

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, Tag

MAX_ITEMS = 1024

Status = Literal["in_progress", "completed", "incomplete", "searching", "interpreting", "failed"]
Arguments = Annotated[str, AfterValidator(json_object)]


class InputTextPart(StrictModel):
    type: Literal["input_text"]
    text: str


class OutputTextPart(StrictModel):
    unsupported = OUTPUT_TEXT

    type: Literal["output_text"]
    text: str
    parsed: Parsed = None


Part = Annotated[
    Annotated[InputTextPart, Tag(TAG + "input_text")]
    | Annotated[OutputTextPart, Tag(TAG + "output_text")],
    by_type("input_text", "output_text"),
]


def _as_parts(content: Any) -> Any:
    return [{"type": "input_text", "text": content}] if isinstance(content, str) else content


Content = Annotated[list[Part], BeforeValidator(_as_parts, json_schema_input_type=str | list[Part])]


def _text(parts: list[InputTextPart | OutputTextPart]) -> str:
    return "".join(part.text for part in parts)


class InputMessage(StrictModel):
    """`developer` is a synonym of `system`."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    id: Label | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None

    def item(self) -> Item:
        role = "system" if self.role == "developer" else self.role
        return MessageItem(role, _text(self.content))


class InputFunctionCall(StrictModel):
    unsupported = FUNCTION_CALL

    type: Literal["function_call"]
    call_id: Label
    name: FunctionName
    arguments: Arguments
    id: Label | None = None
    status: Status | None = None
    parsed_arguments: Parsed = None

    def item(self) -> Item:
        return FunctionCallItem(self.call_id, self.name, self.arguments)


class InputFunctionOutput(StrictModel):
    unsupported = FUNCTION_OUTPUT

    type: Literal["function_call_output"]
    call_id: Label
    output: Content
    id: Label | None = None
    status: Status | None = None

    def item(self) -> Item:
        return FunctionOutputItem(self.call_id, _text(self.output))


class InputMcpCall(StrictModel):
    unsupported = MCP_CALL

    type: Literal["mcp_call"]
    id: Label
    server_label: ServerLabel
    name: FunctionName
    arguments: Arguments
    output: str | None = None
    error: JsonValue = None
    status: Status | None = None

    def item(self) -> Item:
        call_id = self.id.removeprefix("mcp_")
        error = None if self.error is None else _error_text(self.error)
        return ToolRunItem(
            call_id, self.server_label, self.name, self.arguments, self.output or "", error
        )


class OutputLogs(StrictModel):
    type: Literal["logs"]
    logs: str


class InputCodeCall(StrictModel):
    type: Literal["code_interpreter_call"]
    id: Label
    code: str | None = None
    container_id: Label
    outputs: list[OutputLogs] | None = None
    status: Status | None = None

    def item(self) -> Item:
        arguments = json.dumps({"code": self.code or ""})
        logs = "".join(output.logs for output in self.outputs or [])
        failed = self.status == "failed"
        return ToolRunItem(
            self.id.removeprefix("ci_"),
            BUILTIN,
            PYTHON_TOOL,
            arguments,
            "" if failed else logs,
            logs or "failed" if failed else None,
        )


class SearchResult(StrictModel):
    unsupported = SEARCH_RESULT

    text: str | None = None


class InputSearchCall(StrictModel):
    type: Literal["file_search_call"]
    id: Label
    queries: Annotated[list[str], Field(min_length=1, max_length=1)]
    results: list[SearchResult] | None = None
    status: Status | None = None

    def item(self) -> Item:
        arguments = json.dumps({"query": self.queries[0]})
        found = "".join(result.text or "" for result in self.results or [])
        error = "failed" if self.status == "failed" else None
        call_id = self.id.removeprefix("fs_")
        return ToolRunItem(call_id, BUILTIN, DOCUMENTS_TOOL, arguments, found, error)


def _error_text(error: JsonValue) -> str:
    content = error.get("content") if isinstance(error, dict) else error
    return content if isinstance(content, str) else json.dumps(error)


_KINDS = (
    "message",
    "function_call",
    "function_call_output",
    "mcp_call",
    "code_interpreter_call",
    "file_search_call",
)
InputItem = Annotated[
    Annotated[InputMessage, Tag(TAG + "message")]
    | Annotated[InputFunctionCall, Tag(TAG + "function_call")]
    | Annotated[InputFunctionOutput, Tag(TAG + "function_call_output")]
    | Annotated[InputMcpCall, Tag(TAG + "mcp_call")]
    | Annotated[InputCodeCall, Tag(TAG + "code_interpreter_call")]
    | Annotated[InputSearchCall, Tag(TAG + "file_search_call")],
    by_type(*_KINDS, default="message"),
]


def as_items(value: Any) -> Any:
    """A text is what a user says."""
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


Input = Annotated[
    list[InputItem],
    Field(min_length=1, max_length=MAX_ITEMS),
    BeforeValidator(as_items, json_schema_input_type=str | list[InputItem]),
]
