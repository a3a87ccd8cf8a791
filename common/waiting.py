"""Waiting for the first of several things, and passing a stop on."""

import asyncio
from collections.abc import Awaitable
from typing import Any

from dynamo.runtime import Context


async def first_of(*waits: Awaitable[Any]) -> None:
    """Return as soon as one of them does; the others are cancelled."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def link(parent: Context, child: Context) -> None:
    """Stop `child` when `parent` is stopped."""
    await parent.async_killed_or_stopped()
    child.stop_generating()
