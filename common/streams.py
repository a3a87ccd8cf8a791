"""Batching of streams: fewer, larger items when a stream is faster than anyone can read."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TypeVar

from common.protocol import EngineOutput

T = TypeVar("T")


class Pace:
    """How often each stream of this process may send an item.

    Items, not bytes, are what a hop costs, so a process that relays many streams at once sends
    each of them less often: `items_per_s` is shared by the open streams, and no stream waits
    longer than `max_interval_s`. A stream that is slower than its share is never held back.
    """

    def __init__(self, items_per_s: float = 500.0, max_interval_s: float = 0.05) -> None:
        self.items_per_s = items_per_s
        self.max_interval_s = max_interval_s
        self.open_streams = 0

    def interval_s(self) -> float:
        return min(self.open_streams / self.items_per_s, self.max_interval_s)


async def gather_ready(stream: AsyncIterator[T], pace: Pace) -> AsyncGenerator[list[T], None]:
    """Yield what has arrived since the last yield, at most every `pace.interval_s()`.

    The first item is passed on at once (it is the TTFT), and so is the end of the stream. An
    exception of the stream is raised after the items before it.
    """
    loop = asyncio.get_running_loop()
    arrived: list[T] = []
    wake = asyncio.Event()
    ended = asyncio.Event()

    async def pump() -> None:
        try:
            async for item in stream:
                arrived.append(item)
                wake.set()
        finally:
            ended.set()
            wake.set()

    pace.open_streams += 1
    pumping = asyncio.create_task(pump())
    try:
        next_send = 0.0
        while arrived or not ended.is_set():
            await wake.wait()
            wake.clear()
            early = next_send - loop.time()
            if early > 0 and not ended.is_set():
                await _wait_at_most(ended, early)
            if arrived:
                batch = arrived.copy()
                arrived.clear()
                next_send = loop.time() + pace.interval_s()
                yield batch
        await pumping
    finally:
        pace.open_streams -= 1
        pumping.cancel()
        await asyncio.gather(pumping, return_exceptions=True)


async def _wait_at_most(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass


def merge_outputs(outputs: list[EngineOutput]) -> EngineOutput:
    """Consecutive items of one stream as one item; changes the first of them."""
    merged = outputs[0]
    for output in outputs[1:]:
        merged.token_ids += output.token_ids
        if output.logprobs is not None:
            merged.logprobs = (merged.logprobs or []) + output.logprobs
        merged.finish_reason = output.finish_reason
        merged.timings = output.timings
        merged.error = output.error
        merged.kv = output.kv
    return merged
