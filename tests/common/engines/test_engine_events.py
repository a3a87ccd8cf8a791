"""Reading an engine's own KV events: gaps, what it sends again, nonsense."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from common.engines import engine_events
from common.engines.engine_events import EngineEvents
from common.engines.event_translation import EventTranslation
from common.kv import AllBlocksCleared, BlockStored, KvEvent
from tests.chapter1.helpers import eventually

import msgspec
import pytest
import zmq
import zmq.asyncio

END = (-1).to_bytes(8, "big", signed=True)


class FakePublisher:
    """An engine's two sockets; `batches` are those it can send again, a topic before them."""

    def __init__(self, folder: Path, context: zmq.asyncio.Context) -> None:
        self.address, self.again = f"ipc://{folder}/events", f"ipc://{folder}/again"
        self.batches: dict[int, bytes] = {}
        self.requests = 0
        self._events = context.socket(zmq.XPUB)
        self._events.bind(self.address)
        self._replay = context.socket(zmq.ROUTER)
        self._replay.bind(self.again)

    async def subscribed(self) -> None:
        """Only from then on does nothing get lost."""
        await self._events.recv()

    async def send(self, number: int, payload: bytes | None = None) -> None:
        frames = [b"", number.to_bytes(8, "big"), payload or one_block(number)]
        await self._events.send_multipart(frames)

    async def raw(self, *frames: bytes) -> None:
        await self._events.send_multipart(list(frames))

    async def answer(self) -> None:
        while True:
            client, _, first = await self._replay.recv_multipart()
            self.requests += 1
            for number, payload in self.batches.items():
                if number >= int.from_bytes(first, "big"):
                    frames = [client, b"", b"topic", number.to_bytes(8, "big"), payload]
                    await self._replay.send_multipart(frames)
            await self._replay.send_multipart([client, b"", b"", END, b""])


def one_block(number: int) -> bytes:
    block = ["BlockStored", [number], None, [number, 7], 2]
    return msgspec.msgpack.encode([0.0, [block]])


class Reader:
    def __init__(self, publisher: FakePublisher, *, replay: bool) -> None:
        translation = EventTranslation(2, has_copies=True)
        again = publisher.again if replay else ""
        self.events = EngineEvents(publisher.address, translation, replay=again)
        self.got: list[KvEvent] = []
        self.events.subscribe(self.got.extend)

    def told(self) -> list[Any]:
        """The hashes of what was stored, and "cleared"."""
        return [
            event.block_hashes[0] if isinstance(event, BlockStored) else "cleared"
            for event in self.got
            if isinstance(event, BlockStored | AllBlocksCleared)
        ]


@contextlib.asynccontextmanager
async def reading(
    tmp_path: Path, *, replay: bool = False
) -> AsyncIterator[tuple[FakePublisher, Reader]]:
    with zmq.asyncio.Context() as context:
        publisher = FakePublisher(tmp_path, context)
        reader = Reader(publisher, replay=replay)
        await reader.events.connected()
        await publisher.subscribed()
        tasks = [asyncio.create_task(work) for work in (publisher.answer(), reader.events.run())]
        try:
            yield publisher, reader
            assert not any(task.done() for task in tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            reader.events.close()
            context.destroy(linger=0)


async def test_batches_come_in_order(tmp_path: Path) -> None:
    async with reading(tmp_path) as (publisher, reader):
        for number in range(3):
            await publisher.send(number)
        await publisher.send(1)  # again: of no interest
        await publisher.send(3)
        await eventually(lambda: reader.told() == [0, 1, 2, 3])


async def test_a_gap_without_help_means_that_nothing_is_known(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with reading(tmp_path) as (publisher, reader):
        await publisher.send(0)
        await publisher.send(3)
        await eventually(lambda: reader.told() == [0, "cleared", 3])
        assert "KV events 1 to 2 of the engine were missed" in caplog.text


async def test_a_gap_is_filled_by_what_the_engine_sends_again(tmp_path: Path) -> None:
    """Also the one before the first batch that is seen."""
    async with reading(tmp_path, replay=True) as (publisher, reader):
        publisher.batches = {number: one_block(number) for number in range(6)}
        await publisher.send(2)
        await publisher.send(5)
        await eventually(lambda: reader.told() == [0, 1, 2, 3, 4, 5])
        assert publisher.requests == 2


async def test_what_the_engine_no_longer_has(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with reading(tmp_path, replay=True) as (publisher, reader):
        publisher.batches = {number: one_block(number) for number in (3, 4)}
        await publisher.send(0)
        await publisher.send(5)
        await eventually(lambda: reader.told() == [0, "cleared", 3, 4, 5])
        assert "and the engine no longer has them" in caplog.text


async def test_an_engine_that_does_not_send_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_events, "REPLAY_TIMEOUT_S", 0.05)
    async with reading(tmp_path, replay=True) as (publisher, reader):
        reader.events._replay_address = f"ipc://{tmp_path}/nobody"
        await publisher.send(0)
        await publisher.send(2)
        await eventually(lambda: reader.told() == [0, "cleared", 2])


async def test_nonsense_does_not_end_the_reading(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What is cached is unknown after it; what comes later counts again."""
    async with reading(tmp_path) as (publisher, reader):
        await publisher.send(0)
        await publisher.send(1, b"\xc1")
        await publisher.raw(b"one frame")
        await publisher.raw(b"", b"short", one_block(9))
        await publisher.send(2)
        await eventually(lambda: reader.told() == [0, *["cleared"] * 3, 2])
        assert "cannot be understood" in caplog.text


async def test_an_engine_that_was_cleared_but_has_not_said_so(tmp_path: Path) -> None:
    async with reading(tmp_path) as (publisher, reader):
        await publisher.send(0)
        await eventually(lambda: reader.told() == [0])
        reader.events.cleared()
        assert reader.told() == [0, "cleared"]
        await publisher.send(1, msgspec.msgpack.encode([0.0, [["AllBlocksCleared"]]]))
        await publisher.send(2, one_block(0))
        await eventually(lambda: reader.told() == [0, "cleared", "cleared", 0])


async def test_nobody_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_events, "CONNECT_TIMEOUT_S", 0.05)
    translation = EventTranslation(2, has_copies=True)
    events = EngineEvents(f"ipc://{tmp_path}/nobody", translation)
    with pytest.raises(TimeoutError):
        await events.connected()
    events.close()
