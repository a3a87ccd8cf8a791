"""Waiting for the first of several things; passing a stop or a failure on."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any

from dynamo.runtime import Context


async def first_of(*waits: Awaitable[Any]) -> None:
    """Return as soon as one of them does; the others are cancelled."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def link(parent: Context, child: Context) -> None:
    """Stop `child` when `parent` is stopped."""
    await parent.async_killed_or_stopped()
    child.stop_generating()


async def stopped_within(context: Context, seconds: float) -> None:
    """Wait so long, or until the context is stopped."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await context.async_killed_or_stopped()


@asynccontextmanager
async def linked_child(parent: Context, request_id: str) -> AsyncIterator[Context]:
    """A context for a request of our own, which is stopped with its parent."""
    child = parent.detached(request_id)
    linked = asyncio.ensure_future(link(parent, child))
    try:
        yield child
    finally:
        linked.cancel()
        await asyncio.gather(linked, return_exceptions=True)


def complete_with_failure(failed: asyncio.Future[BaseException], task: asyncio.Task[None]) -> None:
    """For a task's done callback: if the task failed, its exception becomes `failed`'s result."""
    error = None if task.cancelled() else task.exception()
    if error is not None and not failed.done():
        failed.set_result(error)
