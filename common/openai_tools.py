"""A chat request with functions that the model may call.

Source: https://platform.openai.com/docs/api-reference/chat/create and
`/docs/guides/function-calling`.
"""

import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from common.openai_fields import StrictModel, bad_value
from common.openai_requests import ChatRequest
from common.openai_schemas import check_parameters
from common.openai_tool_messages import ToolChatMessage, calls_answered
from common.openai_unsupported import TOOL_PARAMETERS
from common.openai_values import FunctionName
from common.protocol_agent import ToolProcessRequest
from common.protocol_tools import FunctionTool, ToolChoice

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, model_validator

MAX_TOOLS = 128
MAX_TOOLS_BYTES = 64 * 1024
"""Of all the tools of a request together, as JSON."""

Parameters = Annotated[dict[str, JsonValue], AfterValidator(check_parameters)]


def bounded(tools: Any) -> Any:
    """`tools`, unless they are too much to look at each of them."""
    if len(json.dumps(tools)) > MAX_TOOLS_BYTES:
        raise bad_value(f"The tools are over the limit of {MAX_TOOLS_BYTES} bytes.")
    return tools


class FunctionDefinition(StrictModel):
    """A function; its arguments are of its schema whenever a call is forced."""

    name: FunctionName
    description: str | None = None
    parameters: Parameters | None = None
    strict: bool | None = None

    def tool(self) -> FunctionTool:
        return FunctionTool(self.name, self.description or "", self.parameters or None)


class ChatTool(StrictModel):
    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(StrictModel):
    name: FunctionName


class FunctionReference(StrictModel):
    type: Literal["function"]
    function: NamedFunction


class AllowedTools(StrictModel):
    mode: Literal["auto", "required"]
    tools: Annotated[list[FunctionReference], Field(min_length=1, max_length=MAX_TOOLS)]


class ChatToolChoice(StrictModel):
    """A choice that is a string is one with that `type`."""

    type: Literal["auto", "none", "required", "function", "allowed_tools"]
    function: NamedFunction | None = None
    allowed_tools: AllowedTools | None = None

    @model_validator(mode="after")
    def check_members(self) -> Self:
        for member in ("function", "allowed_tools"):
            if (getattr(self, member) is not None) != (self.type == member):
                raise bad_value(f"Needed with type '{member}', and only then.", member)
        return self

    def named(self) -> list[tuple[tuple[str | int, ...], str]]:
        """The functions it names, with the paths to the names."""
        if self.function is not None:
            return [(("function", "name"), self.function.name)]
        tools = self.allowed_tools.tools if self.allowed_tools else []
        path = ("allowed_tools", "tools")
        return [
            ((*path, index, "function", "name"), tool.function.name)
            for index, tool in enumerate(tools)
        ]


def _as_object(choice: Any) -> Any:
    if not isinstance(choice, str):
        return choice
    if choice not in ("auto", "none", "required"):
        raise bad_value(f"Unknown: '{choice[:80]}'.")
    return {"type": choice}


class ToolChatRequest(ChatRequest):
    """The body of POST /v1/chat/completions where the model may call functions."""

    unsupported = TOOL_PARAMETERS

    messages: Annotated[
        list[ToolChatMessage],
        AfterValidator(calls_answered),
        Field(
            min_length=1,
            description="a list of messages with a role (system, developer, user, assistant, "
            "tool) and a content (a string, or a list of text parts); an assistant's may have "
            "tool_calls, each of which a tool's message right after it answers by tool_call_id",
        ),
    ]
    tools: Annotated[
        list[ChatTool] | None,
        Field(
            max_length=MAX_TOOLS,
            description=f'a list of up to {MAX_TOOLS} {{"type": "function", "function": {{"name": '
            '..., "description": ..., "parameters": JSON schema, "strict": true or false}}, with '
            f"different names of a-z, A-Z, 0-9, _ and -, together up to {MAX_TOOLS_BYTES} bytes",
        ),
        BeforeValidator(bounded, json_schema_input_type=list[ChatTool] | None),
    ] = None
    tool_choice: Annotated[
        ChatToolChoice | None,
        BeforeValidator(
            _as_object,
            json_schema_input_type=Literal["auto", "none", "required"] | ChatToolChoice | None,
        ),
        Field(
            description='"auto", "none", "required", {"type": "function", "function": {"name": '
            '...}} or {"type": "allowed_tools", "allowed_tools": {"mode": "auto" or "required", '
            '"tools": [{"type": "function", "function": {"name": ...}}, ...]}}'
        ),
    ] = None
    parallel_tool_calls: Annotated[
        bool | None, Field(description="true: an answer may have several calls; default true")
    ] = None

    @model_validator(mode="after")
    def check_tools(self) -> Self:
        names = enumerate(tool.function.name for tool in self.tools or [])
        check_names(names, "function", "name")
        known = {tool.function.name for tool in self.tools or []}
        if self.tool_choice is None:
            return self
        if not known and self.tool_choice.type not in ("auto", "none"):
            raise bad_value("Only with 'tools'.", "tool_choice")
        for path, name in self.tool_choice.named():
            if name not in known:
                raise bad_value(f"'{name}' is none of the tools.", "tool_choice", *path)
        return self

    def field_names(self) -> dict[str, str]:
        # Without a format of the answer, the schema is the one of the calls.
        schema = "tools" if self.response_format is None else "response_format"
        return {**super().field_names(), "json_schema": schema}

    def may_call(self) -> bool:
        choice = self.tool_choice.type if self.tool_choice else "auto"
        return bool(self.tools) and choice != "none"


def to_tool_process_request(request: ToolChatRequest) -> ToolProcessRequest:
    """The request as the processor takes it."""
    tools = [tool.function.tool() for tool in request.tools or []]
    tool_choice = ToolChoice()
    choice = request.tool_choice
    if choice is not None and choice.allowed_tools is not None:
        allowed = {name for _, name in choice.named()}
        tools = [tool for tool in tools if tool.name in allowed]
        tool_choice = ToolChoice(choice.allowed_tools.mode)
    elif choice is not None and choice.function is not None:
        tool_choice = ToolChoice("required", choice.function.name)
    elif choice is not None and choice.type in ("none", "required"):
        tool_choice = ToolChoice(choice.type)
    return ToolProcessRequest(
        model=request.model,
        messages=[message.chat_message() for message in request.messages],
        sampling=request.chat_sampling(),
        stop=request.stop or [],
        tools=tools,
        tool_choice=tool_choice,
        parallel_tool_calls=request.parallel_tool_calls is not False,
    )


def check_names(names: Iterable[tuple[int, str]], *path: str) -> None:
    """Refuse a name that two tools have; with each comes its tool's place, from which `path` leads.

    Raises:
        PydanticCustomError: see `openai_fields.bad_value`.
    """
    seen: set[str] = set()
    for index, name in names:
        if name in seen:
            raise bad_value(f"'{name}' is the name of two tools.", "tools", index, *path)
        seen.add(name)
