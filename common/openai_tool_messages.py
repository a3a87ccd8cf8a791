"""The messages of a chat in which functions are called.

Every call is answered by a message of role `tool` before the conversation goes on, and a tool
message answers a call. Source: https://platform.openai.com/docs/api-reference/chat/create and
`/docs/guides/function-calling`.
"""

from typing import Annotated, Any, Literal, Self

from common.openai_fields import StrictModel, bad_value
from common.openai_messages import TextPart, text_of
from common.openai_unsupported import TOOL_MESSAGE_MEMBERS
from common.openai_values import FunctionName, Label
from common.protocol import ChatMessage
from common.protocol_tools import ToolCall

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, model_validator
from pydantic_core import from_json

MAX_CALLS = 128
"""Of one message."""


def json_object(text: str) -> str:
    """`text`, the arguments of a call."""
    try:
        value: Any = from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise bad_value("Arguments are the text of a JSON object; this is no JSON.") from error
    if not isinstance(value, dict):
        raise bad_value("Arguments are the text of a JSON object.")
    return text


def _text_or_none(content: Any) -> str | None:
    return None if content is None else text_of(content)


Parsed = Annotated[
    JsonValue, Field(description="added by the client's parse(), to be sent back; has no effect")
]


class CalledFunction(StrictModel):
    name: FunctionName
    arguments: Annotated[str, AfterValidator(json_object)]
    parsed_arguments: Parsed = None


class ChatToolCall(StrictModel):
    id: Label
    type: Literal["function"]
    function: CalledFunction


class ToolChatMessage(StrictModel):
    """One turn. An assistant's may call, with or without a content; a tool's answers a call."""

    unsupported = TOOL_MESSAGE_MEMBERS

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        str | None,
        BeforeValidator(_text_or_none, json_schema_input_type=str | list[TextPart] | None),
    ] = None
    tool_calls: Annotated[list[ChatToolCall], Field(max_length=MAX_CALLS)] | None = None
    tool_call_id: Label | None = None
    parsed: Parsed = None

    @model_validator(mode="after")
    def check_role(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise bad_value("Needed: a string or a list of text parts.", "content")
        if self.tool_calls and self.role != "assistant":
            raise bad_value("Only in a message with the role 'assistant'.", "tool_calls")
        if self.tool_call_id is not None and self.role != "tool":
            raise bad_value("Only in a message with the role 'tool'.", "tool_call_id")
        if self.tool_call_id is None and self.role == "tool":
            raise bad_value("Needed with the role 'tool': the id of a call.", "tool_call_id")
        return self

    def chat_message(self) -> ChatMessage:
        return ChatMessage(
            role="system" if self.role == "developer" else self.role,
            content=self.content or "",
            tool_calls=[
                ToolCall(call.id, call.function.name, call.function.arguments)
                for call in self.tool_calls or []
            ],
            tool_call_id=self.tool_call_id,
        )


def calls_answered(messages: list[ToolChatMessage]) -> list[ToolChatMessage]:
    """`messages`, if each call has one answer, before anything else is said."""
    open_calls: dict[str, tuple[str | int, ...]] = {}
    for index, message in enumerate(messages):
        if message.tool_call_id is not None:
            if open_calls.pop(message.tool_call_id, None) is None:
                problem = "No call of the assistant's message before it that has no answer yet."
                raise bad_value(problem, index, "tool_call_id")
            continue
        _none_open(open_calls)
        for number, call in enumerate(message.tool_calls or []):
            if call.id in open_calls:
                problem = "Two calls of one message have this id."
                raise bad_value(problem, index, "tool_calls", number, "id")
            open_calls[call.id] = (index, "tool_calls", number)
    _none_open(open_calls)
    return messages


def _none_open(open_calls: dict[str, tuple[str | int, ...]]) -> None:
    for call_id, path in open_calls.items():
        problem = f"No tool message answers the call '{call_id[:80]}' before the next message."
        raise bad_value(problem, *path)
