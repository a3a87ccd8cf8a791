"""The calls of one step, run at once."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any

from chapter4.run_tool import ToolResult
from common.protocol_agent import AgentEvent, FunctionCallItem, ItemDone, ToolRunItem, ToolStarted

from dynamo.runtime import Context


async def run_calls(
    calls: Mapping[int, FunctionCallItem | ToolRunItem],
    run: Callable[[ToolRunItem], Awaitable[ToolResult]],
    most: int,
    context: Context,
) -> AsyncGenerator[AgentEvent, None]:
    """Run the agent's own of the `calls`, by output index, `most` of them; tell the caller's.

    What the tools said is in the items then. When the run is stopped, they are cancelled.
    """
    running: dict[asyncio.Future[ToolResult], tuple[int, ToolRunItem]] = {}
    stopped: asyncio.Future[Any] = asyncio.ensure_future(context.async_killed_or_stopped())
    try:
        for index, call in calls.items():
            if isinstance(call, FunctionCallItem):
                yield ItemDone(index, call)
            elif len(running) == most:
                call.error = "not run: the limit of tool calls is reached"
                yield ItemDone(index, call)
            else:
                running[asyncio.ensure_future(run(call))] = index, call
                yield ToolStarted(index)
        while running and not stopped.done():
            waits: list[asyncio.Future[Any]] = [*running, stopped]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for task in [task for task in running if task.done()]:
                index, call = running.pop(task)
                result = task.result()
                call.output, call.error = result.output, result.error
                yield ItemDone(index, call, result.seconds)
        for _, call in running.values():
            call.error = "cancelled"
    finally:
        left: list[asyncio.Future[Any]] = [*running, stopped]
        for waiting in left:
            waiting.cancel()
        await asyncio.gather(*left, return_exceptions=True)
