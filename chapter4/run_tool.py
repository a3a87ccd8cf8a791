"""Run one call of a tool, whatever the tool does.

It may fail, hang, end with `SystemExit`, ignore its cancellation, or return a gigabyte: the caller
gets a `ToolResult` in time, of bounded size. What it says is data; nothing here acts on it.
"""

import asyncio
import logging
import random
import time
from dataclasses import dataclass

from chapter4.tool_arguments import parse_arguments
from chapter4.tools import Tool, ToolContext, ToolError

logger = logging.getLogger(__name__)

MAX_ERROR = 1000  # characters
FIRST_BACKOFF_S = 0.2
# What a cancelled tool has to end by itself; then it is left behind.
CANCEL_GRACE_S = 2.0

_left_behind: set[asyncio.Task[str]] = set()


@dataclass(frozen=True)
class ToolResult:
    """What the model is told: `output`, or why there is none."""

    output: str
    error: str | None
    seconds: float
    attempts: int


async def run_tool(
    tool: Tool,
    arguments: str,
    context: ToolContext,
    *,
    deadline: float,
    max_output: int = 8192,
    retries: int = 2,
) -> ToolResult:
    """Call the tool with the model's `arguments`, until `deadline` (`time.monotonic`) at most.

    A transient failure is tried again so often, after a growing random wait. An output of more
    than `max_output` characters is cut. Raises nothing but `CancelledError`, after the tool has
    been cancelled.
    """
    started = time.monotonic()
    attempts = 0

    def result(output: str, error: str | None) -> ToolResult:
        seconds = time.monotonic() - started
        return ToolResult(output, error and bounded(error, MAX_ERROR), seconds, attempts)

    try:
        given = parse_arguments(arguments, tool.parameters)
    except ValueError as error:
        return result("", f"The arguments do not fit {tool.name}: {error}.")
    while True:
        timeout_s = min(tool.timeout_s, deadline - time.monotonic())
        if timeout_s <= 0:
            return result("", "There was no time left for it.")
        attempts += 1
        try:
            output = await _attempt(tool, given, context, timeout_s)
            return result(bounded(output, max_output), None)
        except ToolError as error:
            wait_s = FIRST_BACKOFF_S * 2 ** (attempts - 1) * random.uniform(0.5, 1.5)
            in_time = time.monotonic() + wait_s < deadline
            if not error.transient or attempts > retries or not in_time:
                return result("", str(error))
            logger.info("%s failed and is tried again in %.2f s: %s", tool.name, wait_s, error)
        await asyncio.sleep(wait_s)


async def _attempt(
    tool: Tool, arguments: dict[str, object], context: ToolContext, timeout_s: float
) -> str:
    """One call, in a task of its own.

    Raises:
        ToolError: it failed, or did not answer in time.
    """
    task = asyncio.create_task(_contained(tool, arguments, context), name=f"tool {tool.name}")
    try:
        done, _ = await asyncio.wait({task}, timeout=timeout_s)
    finally:
        if not task.done():
            await _cancel(task)
    if not done:
        raise ToolError(f"{tool.name} did not answer within {timeout_s:.3g} s")
    if task.cancelled():
        raise ToolError(f"{tool.name} cancelled itself")
    return task.result()


async def _contained(tool: Tool, arguments: dict[str, object], context: ToolContext) -> str:
    """As `Tool.call`, but nothing other than `ToolError` and `CancelledError` comes out.

    `SystemExit` would end the event loop.
    """
    try:
        output = await tool.call(arguments, context)
        if not isinstance(output, str):
            raise ToolError(f"it returned a {type(output).__name__}, which is no text")
    except (ToolError, asyncio.CancelledError):
        raise
    except (ConnectionError, TimeoutError) as error:
        raise ToolError(_describe(error), transient=True) from error
    except BaseException as error:
        logger.warning("%s failed", tool.name, exc_info=True)
        raise ToolError(_describe(error)) from error
    return output


async def _cancel(task: asyncio.Task[str]) -> None:
    """Cancel, wait until it has ended or its grace is over, whatever comes meanwhile."""
    task.cancel()
    until = time.monotonic() + CANCEL_GRACE_S
    cancelled = False
    while not task.done() and (left := until - time.monotonic()) > 0:
        try:
            await asyncio.wait({task}, timeout=left)
        except asyncio.CancelledError:
            cancelled = True
    if not task.done():
        logger.warning("%s ignores that it was cancelled; it is left behind", task.get_name())
        _left_behind.add(task)
        task.add_done_callback(_left_behind.discard)
    task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    if cancelled:
        raise asyncio.CancelledError


def bounded(text: str, size: int) -> str:
    """At most `size` characters that UTF-8 has, and a note of how many are missing."""
    kept = text[:size].encode("utf-8", "replace").decode("utf-8")
    return kept if len(text) <= size else f"{kept}\n[cut: {len(text) - size} more characters]"


def _describe(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
