"""Streams that just stop: given up when the engine is listed no more, and only then."""

import asyncio
from collections.abc import AsyncGenerator

from chapter3 import silence
from chapter3.silence import Silence, SilentEngineError

import pytest


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silence, "SILENT_S", 0.05)
    monkeypatch.setattr(silence, "CHECK_S", 0.01)


async def lives(instance: int) -> bool:
    return False


class Clock:
    """Stands in for the event loop's, which runs on while a busy machine stalls."""

    now = 0.0

    def time(self) -> float:
        return self.now


async def stops(after: int) -> AsyncGenerator[int, None]:
    for item in range(after):
        yield item
    await asyncio.Event().wait()


async def read(watch: Silence, stream: AsyncGenerator[int, None]) -> list[int]:
    watch.expect(7)
    items: list[int] = []

    async def collect() -> None:
        async for item in watch.watched(stream):
            items.append(item)

    with pytest.raises(SilentEngineError, match="Unavailable: it sent nothing"):
        await collect()
    return items


async def test_it_is_given_up_and_the_reader_goes_on() -> None:
    watch = Silence(lambda: [1, 2], lives)
    assert await read(watch, stops(3)) == [0, 1, 2]
    assert await read(watch, stops(0)) == []
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await asyncio.sleep(0)


@pytest.mark.parametrize("listed", [[7, 1], []], ids=["it is listed", "nobody is"])
async def test_silence_alone_is_no_fault(listed: list[int]) -> None:
    watch = Silence(lambda: listed, lives)
    watch.expect(7)
    items = watch.watched(stops(1))
    assert await anext(items) == 0
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(items), 0.3)


async def test_an_engine_that_is_not_listed_may_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    """So does one that drains."""
    monkeypatch.setattr(silence, "SILENT_S", 0.5)
    clock = Clock()

    async def slow() -> AsyncGenerator[int, None]:
        for item in range(20):
            clock.now += 0.04
            await asyncio.sleep(2 * silence.CHECK_S)
            yield item

    watch = Silence(lambda: [1], lives)
    monkeypatch.setattr(watch, "_loop", clock)
    watch.expect(7)
    assert len([item async for item in watch.watched(slow())]) == 20


async def test_nobody_is_given_up_while_an_engine_is_chosen() -> None:
    watch = Silence(lambda: [1], lives)

    async def choosing() -> AsyncGenerator[int, None]:
        watch.expect(None)
        await asyncio.sleep(0.2)
        watch.expect(7)
        yield 1

    assert [item async for item in watch.watched(choosing())] == [1]


async def test_a_reader_that_is_cancelled_is_cancelled() -> None:
    watch = Silence(lambda: [1], lives)
    closed = asyncio.Event()

    async def endless() -> AsyncGenerator[int, None]:
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            closed.set()

    async def reading() -> None:
        async for _ in watch.watched(endless()):
            pass

    task = asyncio.create_task(reading())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert closed.is_set()
    assert len(asyncio.all_tasks()) == 1


async def test_an_engine_that_hangs_but_is_listed_is_given_up() -> None:
    """A process that blocks may keep its lease: its runtime's threads go on."""
    asked: list[int] = []

    async def hangs(instance: int) -> bool:
        asked.append(instance)
        return len(asked) == 3

    watch = Silence(lambda: [7], hangs)
    assert await read(watch, stops(2)) == [0, 1]
    assert asked == [7, 7, 7]


async def test_an_item_that_comes_while_the_router_is_asked_counts() -> None:
    answer = asyncio.Event()

    async def hangs(instance: int) -> bool:
        late = answer.is_set()
        await answer.wait()
        return not late

    async def late() -> AsyncGenerator[int, None]:
        await asyncio.sleep(0.2)
        yield 1
        answer.set()
        await asyncio.sleep(0.03)
        yield 2

    watch = Silence(lambda: [7], hangs)
    watch.expect(7)
    assert [item async for item in watch.watched(late())] == [1, 2]
