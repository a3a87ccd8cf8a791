"""Batching of streams: nothing lost, nothing reordered, nothing held back for long."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

from common.protocol import EngineOutput, EngineTimings, TokenLogprobs
from common.streams import Pace, gather_ready, merge_outputs

import pytest

SLOW = Pace(items_per_s=1e-3, max_interval_s=30.0)


async def numbers(count: int, *, fail: bool = False) -> AsyncIterator[int]:
    for number in range(count):
        yield number
        await asyncio.sleep(0)
    if fail:
        raise ValueError("broken stream")


async def test_everything_arrives_in_order_in_few_items() -> None:
    batches = [batch async for batch in gather_ready(numbers(100), SLOW)]
    assert [number for batch in batches for number in batch] == list(range(100))
    assert len(batches[0]) == 1, "the first item is the TTFT: it must not wait for others"
    assert len(batches) <= 3


async def test_the_end_of_the_stream_cuts_the_interval_short() -> None:
    async with asyncio.timeout(5):
        assert [b async for b in gather_ready(numbers(3), SLOW)] == [[0], [1, 2]]


async def test_an_item_is_sent_when_its_interval_is_over_although_no_other_follows() -> None:
    """A timer sends it: the engine may take long over the next token."""
    second = asyncio.Event()
    never = asyncio.Event()

    async def stalls() -> AsyncIterator[int]:
        yield 0
        await second.wait()
        yield 1
        await never.wait()

    async with aclosing(gather_ready(stalls(), Pace(1e-3, max_interval_s=0.01))) as batches:
        assert await anext(batches) == [0]
        second.set()
        async with asyncio.timeout(5):
            assert await anext(batches) == [1]


async def test_an_exception_comes_after_the_items_before_it() -> None:
    got: list[int] = []

    async def read() -> None:
        async for batch in gather_ready(numbers(5, fail=True), SLOW):
            got.extend(batch)

    with pytest.raises(ValueError, match="broken stream"):
        await read()
    assert got == list(range(5))


async def test_leaving_early_closes_the_source_and_frees_its_share() -> None:
    closed = asyncio.Event()
    pace = Pace()

    async def endless() -> AsyncIterator[int]:
        try:
            while True:
                yield 0
                await asyncio.sleep(0)
        finally:
            closed.set()

    async with aclosing(gather_ready(endless(), pace)) as batches:
        await anext(batches)
        assert pace.open_streams == 1
    async with asyncio.timeout(5):
        await closed.wait()
    assert pace.open_streams == 0


def test_streams_share_the_items_of_a_second() -> None:
    pace = Pace(items_per_s=1000, max_interval_s=0.05)
    pace.open_streams = 10
    assert pace.interval_s() == 0.01
    pace.open_streams = 1000
    assert pace.interval_s() == 0.05


def test_merged_items_say_what_the_single_ones_said() -> None:
    timings = EngineTimings(1, 2, 3)
    merged = merge_outputs(
        [
            EngineOutput([1], [TokenLogprobs(-1)], worker_id=7, cached_tokens=16),
            EngineOutput([2, 3], [TokenLogprobs(-2), TokenLogprobs(-3)]),
            EngineOutput(finish_reason="stop", timings=timings),
        ]
    )
    assert merged == EngineOutput(
        [1, 2, 3],
        [TokenLogprobs(-1), TokenLogprobs(-2), TokenLogprobs(-3)],
        worker_id=7,
        cached_tokens=16,
        finish_reason="stop",
        timings=timings,
    )
