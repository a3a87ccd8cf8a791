"""An agent's output items as those of POST /v1/responses, and a stored run as its response."""

from typing import Any

from common.openai_response_objects import (
    Asked,
    ConversationObject,
    IncompleteDetails,
    ItemStatus,
    Logs,
    McpExecutionError,
    OutputCodeCall,
    OutputFunctionCall,
    OutputItem,
    OutputMcpCall,
    OutputMessage,
    OutputSearchCall,
    OutputText,
    ResponseObject,
    SearchResult,
    response_error,
    response_usage,
)
from common.openai_response_tools import BUILTIN, DOCUMENTS_TOOL, PYTHON_TOOL
from common.protocol import PipelineError
from common.protocol_agent import (
    FunctionCallItem,
    Item,
    MessageItem,
    RunEnded,
    StoredResponse,
    ToolRunItem,
)

import msgspec
from pydantic_core import from_json

CODE, SEARCH = "code_interpreter", "file_search"
_OPENAIS_NAMES = {PYTHON_TOOL: CODE, DOCUMENTS_TOOL: SEARCH}


class OutputItems:
    """Makes the output items of one response; `asked` says what they are to look like.

    A call of a tool that the request named as `code_interpreter` or `file_search` is an item of
    that type; of the agent's other tools, an `mcp_call`.
    """

    def __init__(self, response_id: str, asked: Asked) -> None:
        self._response_id = response_id
        self._types = {str(tool.get("type")) for tool in asked.tools}
        self._include = asked.include

    def type_of(self, server: str | None, name: str) -> str:
        """`function`, `mcp`, `code_interpreter` or `file_search`."""
        if server is None:
            return "function"
        openais = _OPENAIS_NAMES.get(name)
        return openais if server == BUILTIN and openais in self._types and openais else "mcp"

    def message(self, index: int, text: str | None, status: ItemStatus) -> OutputMessage:
        """The message that is output item number `index`; without a text it has no content yet."""
        content = [] if text is None else [OutputText(text)]
        message_id = f"msg_{self._response_id.removeprefix('resp_')}_{index}"
        return OutputMessage(message_id, status, content=content)

    def function_call(
        self, call_id: str, name: str, arguments: str, status: ItemStatus
    ) -> OutputFunctionCall:
        return OutputFunctionCall(f"fc_{call_id}", call_id, name, status, arguments)

    def tool_run(
        self, run: ToolRunItem, status: ItemStatus, *, done: bool
    ) -> OutputMcpCall | OutputCodeCall | OutputSearchCall:
        """The call of a tool of the agent's; with what it said, if it is `done`."""
        said = run.output if run.error is None else run.error
        kind = self.type_of(run.server, run.name)
        if kind == CODE:
            code = argument(run.arguments, "code")
            item = OutputCodeCall(f"ci_{run.call_id}", self._container_id(), status, code)
            if done and "code_interpreter_call.outputs" in self._include:
                item.outputs = [Logs(said)]
            return item
        if kind == SEARCH:
            query = argument(run.arguments, "query")
            queries = [] if query is None else [query]
            search = OutputSearchCall(f"fs_{run.call_id}", status, queries)
            if done and "file_search_call.results" in self._include:
                search.results = [SearchResult(said)]
            return search
        call = OutputMcpCall(f"mcp_{run.call_id}", run.server, run.name, status, run.arguments)
        if done and run.error is not None:
            call.error = McpExecutionError(run.error)
        elif done:
            call.output = run.output
        return call

    def done(self, index: int, item: Item) -> OutputItem:
        """The item when it is complete."""
        match item:
            case MessageItem():
                return self.message(index, item.content, "completed")
            case FunctionCallItem():
                return self.function_call(item.call_id, item.name, item.arguments, "completed")
            case ToolRunItem():
                status: ItemStatus = "completed" if item.error is None else "failed"
                return self.tool_run(item, status, done=True)
            case _:
                raise PipelineError("internal", f"A run has no output of type {type(item)}.")

    def _container_id(self) -> str:
        return f"cntr_{self._response_id.removeprefix('resp_')}"


def argument(arguments: str, name: str) -> str | None:
    """One of a call's arguments as text; None if they are not complete, or lack it."""
    try:
        value = from_json(arguments)
    except ValueError:
        return None
    found = value.get(name) if isinstance(value, dict) else None
    return None if found is None else str(found)


def asked_in(stored: StoredResponse) -> Asked:
    """What was asked over HTTP; OpenAI's defaults, if another component asked the agent."""
    defaults = Asked(
        created_at=stored.created,
        metadata={},
        parallel_tool_calls=True,
        temperature=1.0,
        text={"format": {"type": "text"}},
        tool_choice="auto",
        tools=[],
        top_p=1.0,
        max_output_tokens=None,
        max_tool_calls=None,
        safety_identifier=None,
        user=stored.user or None,
        store=True,
    )
    return msgspec.convert(stored.document, Asked) if stored.document else defaults


def stored_document(stored: StoredResponse) -> dict[str, Any]:
    """The body of GET /v1/responses/{id}."""
    asked = asked_in(stored)
    items = OutputItems(stored.id, asked)
    response = begun(stored.id, stored.model, asked, stored.instructions)
    response.previous_response_id = stored.previous_response_id
    ended = RunEnded(
        stored.status, stored.usage, stored.reason, stored.error, conversation=stored.session
    )
    output = [items.done(index, item) for index, item in enumerate(stored.output)]
    end(response, ended, output, stored.created)
    document: dict[str, Any] = msgspec.to_builtins(response)
    return document


def begun(response_id: str, model: str, asked: Asked, instructions: str) -> ResponseObject:
    """A response of which nothing has come yet."""
    return ResponseObject(
        **msgspec.structs.asdict(asked),
        id=response_id,
        status="in_progress",
        model=model,
        instructions=instructions or None,
    )


def end(response: ResponseObject, ended: RunEnded, output: list[OutputItem], now: int) -> None:
    """Complete the response of a run that ended in this way; `now` is in seconds since 1970."""
    response.status = ended.status
    response.output = output
    response.usage = response_usage(ended.usage)
    if ended.status == "completed":
        response.completed_at = now
    if ended.reason is not None:
        response.incomplete_details = IncompleteDetails(ended.reason)
    if ended.error is not None:
        response.error = response_error(ended.error)
    if ended.conversation is not None and response.store:
        response.conversation = ConversationObject(ended.conversation)
