"""What a tool is, and how a typed Python function becomes one.

    typed function --function_tool--> Tool --run_tool--> ToolResult

`run_tool.py` calls it; nothing else may, as it is there that what a tool does is contained.
"""

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any

import pydantic
import pydantic_core
from pydantic.json_schema import GenerateJsonSchema

DEFAULT_TIMEOUT_S = 20.0
# A function that never returns keeps its thread; so many calls of one may be stuck at once.
MAX_THREADS = 8


@dataclass(frozen=True)
class ToolContext:
    """Whose call it is; for functions with a parameter of this type, which no schema has."""

    user: str
    session: str


@dataclass(frozen=True)
class Tool:
    """`parameters` is the JSON schema of an object; `call` gets one that matches it.

    `call` returns text, raises `ToolError`, and lets itself be cancelled.
    """

    name: str
    description: str
    parameters: dict[str, Any]
    call: Callable[[dict[str, Any], ToolContext], Awaitable[str]]
    timeout_s: float = DEFAULT_TIMEOUT_S


class ToolError(Exception):
    """A tool's failure in words for the model; a `transient` one is worth another try."""

    def __init__(self, message: str, *, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient


def function_tool(
    function: Callable[..., Any], *, name: str | None = None, timeout_s: float = DEFAULT_TIMEOUT_S
) -> Tool:
    """A tool of a typed function; its docstring says to the model what it is for.

    What an argument may be, the annotation says (`Annotated[int, Field(ge=1, description=…)]`,
    `Literal[…]`, lists, pydantic models). A function that is not `async` runs in a thread, which
    cannot be killed: one that may hang belongs into a process of its own. What is returned
    becomes text, as JSON unless it is a string.

    Raises:
        TypeError: it has no docstring, a parameter has no type, or JSON has no such value.
    """
    name = name or function.__name__
    description = inspect.getdoc(function)
    if not description:
        raise TypeError(f"the tool {name} needs a docstring: the model chooses by it")
    contexts: list[str] = []
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        if parameter.annotation is ToolContext:
            contexts.append(parameter.name)
        elif parameter.annotation is parameter.empty:
            raise TypeError(f"the parameter {parameter.name} of the tool {name} needs a type")
        elif parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise TypeError(f"the parameter {parameter.name} of the tool {name} needs a name")
        else:
            # Aliases, as a field of a model may not be called `json` or `copy`.
            annotation: Any = parameter.annotation
            named: Any = Annotated[annotation, pydantic.Field(alias=parameter.name)]
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[f"argument_{parameter.name}"] = (named, default)
    try:
        model = pydantic.create_model(f"{name}_arguments", **fields)
        parameters = model.model_json_schema(schema_generator=_Schema)
    except pydantic.errors.PydanticUserError as error:
        raise TypeError(f"the tool {name}: {error}") from error
    threads = threading.Semaphore(MAX_THREADS)

    async def call(arguments: dict[str, Any], context: ToolContext) -> str:
        try:
            given = model.model_validate(arguments)
        except pydantic.ValidationError as error:
            raise ToolError(_first_problem(error)) from error
        keywords = {key.removeprefix("argument_"): value for key, value in given}
        keywords |= dict.fromkeys(contexts, context)
        if inspect.iscoroutinefunction(function):
            return _text(await function(**keywords))
        return _text(await _in_thread(lambda: function(**keywords), name, threads))

    return Tool(name, description, parameters, call, timeout_s)


class _Schema(GenerateJsonSchema):
    """Without titles, which cost tokens and say nothing; no object takes what it does not name."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def model_schema(self, schema: Any) -> dict[str, Any]:
        made = super().model_schema(schema)
        made.pop("title", None)
        made.setdefault("additionalProperties", False)
        return made


def _first_problem(error: pydantic.ValidationError) -> str:
    problem = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in problem["loc"])
    return f"{where}: {problem['msg']}" if where else problem["msg"]


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    try:
        return pydantic_core.to_json(value).decode()
    except (pydantic_core.PydanticSerializationError, ValueError) as error:
        raise ToolError(f"it returned a {type(value).__name__}, which is no text") from error


async def _in_thread(work: Callable[[], Any], name: str, threads: threading.Semaphore) -> Any:
    """What `work` returns or raises, from a daemon thread: a stuck one does not stop the exit."""
    if not threads.acquire(blocking=False):
        raise ToolError(f"{MAX_THREADS} calls of it have not returned yet", transient=True)
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)
        elif isinstance(error, Exception) and not isinstance(error, StopIteration):
            future.set_exception(error)
        else:
            future.set_exception(ToolError(f"it ended with {type(error).__name__}"))

    def run() -> None:
        result, failure = None, None
        try:
            result = work()
        except BaseException as error:
            failure = error
        finally:
            threads.release()
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, name=f"tool {name}", daemon=True).start()
    return await future
