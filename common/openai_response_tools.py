"""The tools of a request to POST /v1/responses, and the choice among them.

The caller's functions, which it runs itself, and what the agent runs: sets of tools, which are
OpenAI's `mcp` tools, and two of our own under OpenAI's names for the like, `code_interpreter` and
`file_search`. Source: https://platform.openai.com/docs/api-reference/responses/create.
"""

from typing import Annotated, Any, Literal, Self

from common.openai_fields import TAG, StrictModel, bad_value, by_type
from common.openai_response_unsupported import (
    CODE_INTERPRETER,
    CONTAINER,
    FILE_SEARCH,
    FUNCTION,
    MCP,
    MCP_FILTER,
)
from common.openai_tools import MAX_TOOLS, Parameters
from common.openai_values import FunctionName
from common.protocol_agent import ToolSet
from common.protocol_tools import FunctionTool, ToolChoice

from pydantic import BeforeValidator, Field, Tag, model_validator

BUILTIN = "builtin"
PYTHON_TOOL = "python"
DOCUMENTS_TOOL = "search_documents"
DOCUMENTS = "documents"

ServerLabel = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
Names = Annotated[list[FunctionName], Field(min_length=1, max_length=MAX_TOOLS)]


class ResponseFunction(StrictModel):
    """A function; its arguments are of its schema whenever a call is forced."""

    unsupported = FUNCTION

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: Parameters | None = None
    strict: bool | None = None

    def tool(self) -> FunctionTool:
        return FunctionTool(self.name, self.description or "", self.parameters or None)


class ToolFilter(StrictModel):
    unsupported = MCP_FILTER

    tool_names: Names


class McpTool(StrictModel):
    """A set of tools that the agent was started with. The request cannot bring a server along."""

    unsupported = MCP

    type: Literal["mcp"]
    server_label: ServerLabel
    allowed_tools: Annotated[
        ToolFilter | None,
        BeforeValidator(
            lambda names: {"tool_names": names} if isinstance(names, list) else names,
            json_schema_input_type=Names | ToolFilter | None,
        ),
    ] = None
    require_approval: Annotated[Literal["never"], Field(description='"never"')]

    def toolset(self) -> ToolSet:
        names = self.allowed_tools.tool_names if self.allowed_tools else None
        return ToolSet(self.server_label, names)


class Container(StrictModel):
    unsupported = CONTAINER

    type: Literal["auto"]


class CodeInterpreterTool(StrictModel):
    unsupported = CODE_INTERPRETER

    type: Literal["code_interpreter"]
    container: Container

    def toolset(self) -> ToolSet:
        return ToolSet(BUILTIN, [PYTHON_TOOL])


class FileSearchTool(StrictModel):
    unsupported = FILE_SEARCH

    type: Literal["file_search"]
    vector_store_ids: Annotated[
        list[Literal["documents"]], Field(min_length=1, max_length=1, description='["documents"]')
    ]

    def toolset(self) -> ToolSet:
        return ToolSet(BUILTIN, [DOCUMENTS_TOOL])


OwnTool = McpTool | CodeInterpreterTool | FileSearchTool
ResponseTool = Annotated[
    Annotated[ResponseFunction, Tag(TAG + "function")]
    | Annotated[McpTool, Tag(TAG + "mcp")]
    | Annotated[CodeInterpreterTool, Tag(TAG + "code_interpreter")]
    | Annotated[FileSearchTool, Tag(TAG + "file_search")],
    by_type("function", "mcp", "code_interpreter", "file_search"),
]


class ResponseToolChoice(StrictModel):
    """A choice that is a string is one with that `type`."""

    type: Literal["auto", "none", "required", "function", "mcp", "code_interpreter", "file_search"]
    name: FunctionName | None = None
    server_label: ServerLabel | None = None

    @model_validator(mode="after")
    def check_members(self) -> Self:
        if (self.name is not None) != (self.type in ("function", "mcp")):
            raise bad_value("Needed with the types 'function' and 'mcp', and only then.", "name")
        if (self.server_label is not None) != (self.type == "mcp"):
            raise bad_value("Needed with the type 'mcp', and only then.", "server_label")
        return self

    def choice(self) -> ToolChoice:
        match self.type:
            case "auto" | "none" | "required":
                return ToolChoice(self.type)
            case "code_interpreter":
                return ToolChoice("required", PYTHON_TOOL, BUILTIN)
            case "file_search":
                return ToolChoice("required", DOCUMENTS_TOOL, BUILTIN)
            case _:
                return ToolChoice("required", self.name, self.server_label)

    def problem(self, tools: list[ResponseFunction | OwnTool]) -> str | None:
        """Why it cannot be among these tools, as far as can be told without the sets' contents."""
        if self.type in ("auto", "none"):
            return None
        if self.type == "mcp":
            return self._problem_of_set(tools)
        if any(self._means(tool) for tool in tools):
            return None
        return "It is none of 'tools'."

    def _problem_of_set(self, tools: list[ResponseFunction | OwnTool]) -> str | None:
        """A name is in one set only: what another tool has by this name is not what is meant."""
        for tool in tools:
            if isinstance(tool, McpTool) and tool.server_label == self.server_label:
                allowed = tool.toolset().allowed
                break
        else:
            return f"'{self.server_label}' is no 'mcp' tool of 'tools'."
        if allowed is not None and self.name not in allowed:
            return f"'{self.name}' is none of the 'allowed_tools' of '{self.server_label}'."
        for tool in tools:
            if isinstance(tool, ResponseFunction):
                if tool.name == self.name:
                    return f"'{self.name}' is one of 'tools', not of '{self.server_label}'."
                continue
            other = tool.toolset()
            if other.server != self.server_label and self.name in (other.allowed or []):
                return f"'{self.name}' is of '{other.server}', not of '{self.server_label}'."
        return None

    def _means(self, tool: ResponseFunction | OwnTool) -> bool:
        if self.type not in ("required", tool.type):
            return False
        if isinstance(tool, ResponseFunction):
            return self.name in (None, tool.name)
        return True


def as_choice(choice: Any) -> Any:
    if not isinstance(choice, str):
        return choice
    if choice not in ("auto", "none", "required"):
        raise bad_value(f"Unknown: '{choice[:80]}'.")
    return {"type": choice}
