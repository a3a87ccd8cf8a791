"""Futures that threads complete and coroutines wait for."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any


def new_future() -> "Future[Any]":
    """A future that a waiting coroutine, when cancelled, does not cancel for everyone else."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future


async def wait_first(futures: Sequence["Future[Any]"], timeout: float | None = None) -> bool:
    """Wait until one of `futures` is done; False if none was within `timeout` seconds."""
    wrapped = [asyncio.wrap_future(future) for future in futures]
    try:
        done, _ = await asyncio.wait(wrapped, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for future in wrapped:
            future.cancel()
    return bool(done)
