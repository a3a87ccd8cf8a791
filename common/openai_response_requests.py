"""The body of POST /v1/responses: what is accepted, and what it means to an agent.

Every parameter is honoured or refused with an error that names it. Source of names, ranges and
defaults: https://platform.openai.com/docs/api-reference/responses/create; `nvext` is Dynamo's.
"""

from typing import Annotated, Literal, Self, get_args

from common.openai_fields import StrictModel, bad_value
from common.openai_messages import finite
from common.openai_response_items import Input
from common.openai_response_tools import (
    ResponseFunction,
    ResponseTool,
    ResponseToolChoice,
    as_choice,
)
from common.openai_response_unsupported import PARAMETERS, TEXT
from common.openai_tools import MAX_TOOLS, bounded, check_names
from common.openai_values import FunctionName, Label, TokenCount
from common.protocol_agent import Budget

import msgspec
from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, model_validator

MAX_STEPS = 64
MAX_TOOL_CALLS = 256
MAX_TIMEOUT_S = 3600
Includable = Literal[
    "code_interpreter_call.outputs",
    "file_search_call.results",
    "reasoning.encrypted_content",  # there is never any
]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None,
    Field(max_length=16, description="up to 16 strings up to 512 characters, by name"),
]
_DEFAULTS = Budget()
_ID = r"^[a-zA-Z0-9_-]{1,64}$"
_ID_TEXT = "1 to 64 letters, digits, _ and -"


class TextFormat(StrictModel):
    """The members of a JSON schema, which stand in a chat's `response_format` a level deeper."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str | None, Field(pattern=_ID)] = None
    description: str | None = None
    schema_: Annotated[
        dict[str, JsonValue] | None, AfterValidator(finite), Field(alias="schema")
    ] = None
    strict: bool | None = None

    @model_validator(mode="after")
    def check_schema(self) -> Self:
        members = {
            "name": self.name,
            "description": self.description,
            "schema": self.schema_,
            "strict": self.strict,
        }
        given = {name: value for name, value in members.items() if value is not None}
        if self.type != "json_schema":
            for name in given:
                raise bad_value("Only with type 'json_schema'.", name)
            return self
        for name in ("name", "schema"):
            if name not in given:
                raise bad_value("Needed with type 'json_schema'.", name)
        return self

    def schema_text(self) -> str | None:
        """The JSON schema that the answer must match, None for free text."""
        if self.type == "text":
            return None
        return msgspec.json.encode(self.schema_ or {"type": "object"}).decode()


class TextConfig(StrictModel):
    unsupported = TEXT

    format: TextFormat | None = None


class ConversationId(StrictModel):
    id: Annotated[str, Field(pattern=_ID)]


class AgentNvext(StrictModel):
    """Dynamo's `nvext`, for a run of an agent."""

    agent: Literal["agent", "planner"] | None = None
    extra_fields: Annotated[list[Literal["steps"]] | None, Field(description='["steps"]')] = None
    max_steps: Annotated[int | None, Field(ge=1, le=MAX_STEPS)] = None
    timeout_s: Annotated[float | None, Field(gt=0, le=MAX_TIMEOUT_S)] = None
    tool_plan: Annotated[list[FunctionName] | None, Field(max_length=MAX_STEPS)] = None


AGENT_NVEXT = (
    '"agent": "agent" (default) or "planner", which splits the task into steps for agents; '
    f'"max_steps": 1 to {MAX_STEPS} answers of the model, default {_DEFAULTS.steps}; "timeout_s": '
    f'seconds, up to {MAX_TIMEOUT_S}, default {_DEFAULTS.seconds:g}; "tool_plan": names of tools '
    'that the first steps must call, one each; "extra_fields": ["steps"] adds what each step took'
)


class ResponseRequest(StrictModel):
    """The body of POST /v1/responses. Absent and null mean the default."""

    unsupported = PARAMETERS

    model: Annotated[Label, Field(description="the id of a model of GET /v1/models")]
    input: Annotated[
        Input,
        Field(
            description="a string, or a list of messages with a role (system, developer, user, "
            "assistant) and a content (a string or a list of input_text and output_text parts), "
            "function_call_output, and the items of earlier responses"
        ),
    ]
    instructions: Annotated[str | None, Field(description="a string")] = None
    previous_response_id: Annotated[
        str | None,
        Field(pattern=_ID, description=f"{_ID_TEXT}, of a stored response; not with conversation"),
    ] = None
    conversation: Annotated[
        ConversationId | None,
        BeforeValidator(
            lambda value: {"id": value} if isinstance(value, str) else value,
            json_schema_input_type=str | ConversationId | None,
        ),
        Field(description=f'an id, {_ID_TEXT}, or {{"id": ...}}; begun if there is none yet'),
    ] = None
    tools: Annotated[
        list[ResponseTool] | None,
        Field(
            max_length=MAX_TOOLS,
            description=f"a list of up to {MAX_TOOLS} of "
            '{"type": "function", "name": ..., "description": ..., "parameters": JSON schema}, '
            '{"type": "mcp", "server_label": "builtin" or a server that the agent was started '
            'with, "allowed_tools": [names], "require_approval": "never"}, {"type": '
            '"code_interpreter", "container": {"type": "auto"}} and {"type": "file_search", '
            '"vector_store_ids": ["documents"]}',
        ),
        BeforeValidator(bounded, json_schema_input_type=list[ResponseTool] | None),
    ] = None
    tool_choice: Annotated[
        ResponseToolChoice | None,
        BeforeValidator(
            as_choice,
            json_schema_input_type=Literal["auto", "none", "required"] | ResponseToolChoice | None,
        ),
        Field(
            description='"auto", "none", "required", {"type": "function", "name": ...}, {"type": '
            '"mcp", "server_label": ..., "name": ...}, {"type": "code_interpreter"} or {"type": '
            '"file_search"}'
        ),
    ] = None
    parallel_tool_calls: Annotated[
        bool | None, Field(description="true: an answer may have several calls; default true")
    ] = None
    max_output_tokens: Annotated[
        TokenCount | None,
        Field(description=f"an integer from 1; default {_DEFAULTS.output_tokens}"),
    ] = None
    max_tool_calls: Annotated[
        int | None,
        Field(
            ge=1,
            le=MAX_TOOL_CALLS,
            description=f"1 to {MAX_TOOL_CALLS} calls that the agent runs, default "
            f"{_DEFAULTS.tool_calls}",
        ),
    ] = None
    temperature: Annotated[
        float | None, Field(ge=0, le=2, description="a number from 0 (greedy) to 2; default 1")
    ] = None
    top_p: Annotated[
        float | None, Field(ge=0, le=1, description="a number from 0 to 1; default 1")
    ] = None
    text: Annotated[
        TextConfig | None,
        Field(
            description='{"format": {"type": "text"}, {"type": "json_object"} or {"type": '
            '"json_schema", "name": ..., "schema": {...}, "strict": ...}}'
        ),
    ] = None
    include: Annotated[
        list[Includable] | None,
        Field(description=f"a list of any of {', '.join(get_args(Includable))}"),
    ] = None
    truncation: Annotated[
        Literal["auto", "disabled"] | None,
        Field(
            description='"auto" (default): what was said first goes when it is too much for the '
            'model; "disabled": the request is refused then'
        ),
    ] = None
    store: Annotated[bool | None, Field(description="true or false; default true")] = None
    stream: Annotated[bool | None, Field(description="true or false")] = None
    metadata: Metadata = None
    user: Annotated[
        Label | None, Field(description="who asks, up to 512 characters; as safety_identifier")
    ] = None
    safety_identifier: Annotated[
        Label | None, Field(description="who asks, up to 512 characters; the new name of user")
    ] = None
    nvext: Annotated[AgentNvext | None, Field(description=AGENT_NVEXT)] = None

    @model_validator(mode="after")
    def check_together(self) -> Self:
        if self.conversation is not None and self.previous_response_id is not None:
            raise bad_value("Not together with 'previous_response_id'.", "conversation")
        if None not in (self.user, self.safety_identifier) and self.user != self.safety_identifier:
            raise bad_value("Differs from 'user'; give one.", "safety_identifier")
        tools = self.tools or []
        functions = [
            (index, tool.name)
            for index, tool in enumerate(tools)
            if isinstance(tool, ResponseFunction)
        ]
        check_names(functions, "name")
        labels = [getattr(tool, "server_label", None) for tool in tools]
        for index, label in enumerate(labels):
            if label is not None and label in labels[:index]:
                raise bad_value("Given twice.", "tools", index, "server_label")
        if self.tool_choice is not None and (problem := self.tool_choice.problem(tools)):
            raise bad_value(problem, "tool_choice")
        return self

    def field_names(self) -> dict[str, str]:
        """What the client calls the fields that the pipeline has other names for."""
        text = self.text is not None and self.text.format is not None
        return {
            "token_ids": "input",
            "messages": "input",
            "max_tokens": "max_output_tokens",
            "json_schema": "text.format" if text else "tools",
            "tool_plan": "nvext.tool_plan",
            "max_steps": "nvext.max_steps",
        }
