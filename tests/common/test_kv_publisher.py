"""What goes over ZMQ, byte for byte, and what a late or deaf subscriber can learn."""

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, cast

import common.kv_publisher
from common.engines.base import Engine
from common.errors import ComponentError
from common.kv import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent, block_hashes
from common.kv_publisher import KvPublisher, publishing
from common.protocol import EngineInfo, EngineMetrics
from launch.ports import free_port, is_free
from tests.common.engines.engine_helpers import replay

import msgspec
import pytest
import zmq
import zmq.asyncio

HOST = "127.0.0.1"
PATIENCE_S = 20.0


class FakeEngine:
    """The part of an engine that is published: its events, its load, and which one it is."""

    def __init__(self, worker_id: int = 0) -> None:
        self.info = EngineInfo("a-model", "simulated", 1000, 2, 100, worker_id)
        self.load = EngineMetrics(running=0, waiting=0, used_blocks=0, total_blocks=100)
        self.emit: Callable[[list[KvEvent]], None]
        self.failed: asyncio.Future[BaseException]

    def subscribe(self, callback: Callable[[list[KvEvent]], None]) -> None:
        self.emit = callback

    def metrics(self) -> EngineMetrics:
        return msgspec.structs.replace(self.load)


@contextlib.asynccontextmanager
async def publishing_of(
    engine: FakeEngine, events: int | None = 0, metrics: int | None = 0, host: str = HOST
) -> AsyncIterator[KvPublisher]:
    engine.failed = asyncio.get_running_loop().create_future()
    async with publishing(cast(Engine, engine), host, events, metrics) as publisher:
        yield publisher


class Subscriber:
    def __init__(self, socket: zmq.asyncio.Socket) -> None:
        self.socket = socket

    async def frames(self) -> list[bytes]:
        async with asyncio.timeout(PATIENCE_S):
            return await self.socket.recv_multipart()

    async def message(self) -> tuple[int, Any]:
        """Sequence number and payload, decoded without any of our types."""
        _, number, payload = await self.frames()
        assert len(number) == 8
        return int.from_bytes(number, "big"), msgspec.msgpack.decode(payload)


Subscribe = Callable[..., Awaitable[Subscriber]]


@pytest.fixture
def subscribe() -> Iterator[Subscribe]:
    """`await subscribe(publisher.source.events)`: a subscriber that has got its first message."""
    with contextlib.ExitStack() as stack:
        context = stack.enter_context(zmq.asyncio.Context())

        async def connect(address: str, topic: str = "") -> Subscriber:
            socket: zmq.asyncio.Socket = stack.enter_context(context.socket(zmq.SUB))
            socket.linger = 0
            socket.ipv6 = True
            socket.subscribe(topic)
            socket.connect(address)
            subscriber = Subscriber(socket)
            await subscriber.frames()
            return subscriber

        yield connect


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life come often, so that tests need not wait."""
    monkeypatch.setattr(common.kv_publisher, "HEARTBEAT_S", 0.02)
    monkeypatch.setattr(common.kv_publisher, "METRICS_INTERVAL_S", 0.002)


def stored(tokens: list[int]) -> BlockStored:
    return BlockStored(block_hashes(tokens, 2), None, tokens, 2)


async def next_events(subscriber: Subscriber) -> tuple[int, Any]:
    """The next batch that is not a sign of life."""
    number, batch = await subscriber.message()
    while not batch[1]:
        number, batch = await subscriber.message()
    return number, batch


async def test_event_frames_are_those_of_vllm(subscribe: Subscribe) -> None:
    engine = FakeEngine()
    async with publishing_of(engine) as publisher:
        subscriber = await subscribe(publisher.source.events, publisher.source.topic)
        engine.emit([BlockStored([-(2**63), 6], None, [1, 2, 3, 4], 2)])
        _, first = await next_events(subscriber)
        engine.emit([BlockStored([7], 6, [5, 6], 2), BlockRemoved([7, 6]), AllBlocksCleared()])
        topic, number, payload = await subscriber.frames()
        while not msgspec.msgpack.decode(payload)[1]:
            topic, number, payload = await subscriber.frames()
        (part,) = publisher.snapshot()
        last = number
        while last != part.seq.to_bytes(8, "big"):  # signs of life that came meanwhile
            _, last, empty = await subscriber.frames()
            assert not msgspec.msgpack.decode(empty)[1]
    second = msgspec.msgpack.decode(payload)
    assert first[1:] == [
        [["BlockStored", [-9223372036854775808, 6], None, [1, 2, 3, 4], 2, None]],
        None,
    ]
    assert second[1:] == [
        [["BlockStored", [7], 6, [5, 6], 2, None], ["BlockRemoved", [7, 6]], ["AllBlocksCleared"]],
        None,
    ]
    assert topic == publisher.source.topic.encode()
    assert abs(second[0] - time.time()) < 60
    assert first[0] <= second[0]


async def test_metrics_frames_have_the_same_form(subscribe: Subscribe) -> None:
    engine = FakeEngine()
    engine.load = EngineMetrics(3, 1, 40, 100, prompt_tokens=64, cached_tokens=32)
    async with publishing_of(engine) as publisher:
        subscriber = await subscribe(publisher.source.metrics, publisher.source.topic)
        _, batch = await subscriber.message()
    assert batch[1:] == [
        {
            "running": 3,
            "waiting": 1,
            "used_blocks": 40,
            "total_blocks": 100,
            "prompt_tokens": 64,
            "cached_tokens": 32,
        },
        None,
    ]


async def test_batches_are_numbered_from_zero() -> None:
    engine = FakeEngine()
    async with publishing_of(engine) as publisher:
        assert [part.seq for part in publisher.snapshot()] == [-1]
        publisher.publish([stored([1, 2])])
        assert [part.seq for part in publisher.snapshot()] == [0]
        publisher.publish([])
        assert [part.seq for part in publisher.snapshot()] == [1]


async def test_events_of_an_engines_thread_keep_their_order(subscribe: Subscribe) -> None:
    """Signs of life come in between and have numbers as well: none is twice, none is missing."""
    engine = FakeEngine()

    def compute() -> None:
        for i in range(500):
            engine.emit([stored([i, i])])

    async with publishing_of(engine) as publisher:
        subscriber = await subscribe(publisher.source.events)
        computing = asyncio.create_task(asyncio.to_thread(compute))
        tokens, numbers = list[int](), list[int]()
        while len(tokens) < 500:
            number, batch = await subscriber.message()
            numbers.append(number)
            tokens += [event[3][0] for event in batch[1]]
        await computing
    assert tokens == list(range(500))
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


async def test_quiet_engines_give_signs_of_life(subscribe: Subscribe) -> None:
    engine = FakeEngine()
    async with publishing_of(engine) as publisher:
        for address in (publisher.source.events, publisher.source.metrics):
            subscriber = await subscribe(address)
            messages = [await subscriber.message() for _ in range(4)]
            first = messages[0][0]
            assert [number for number, _ in messages] == [first, first + 1, first + 2, first + 3]
            assert len({str(batch[1:]) for _, batch in messages}) == 1
    assert messages[0][1][1]["total_blocks"] == 100


async def test_the_load_is_sent_when_it_changes(
    subscribe: Subscribe, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FakeEngine()
    async with publishing_of(engine) as publisher:
        subscriber = await subscribe(publisher.source.metrics)
        monkeypatch.setattr(common.kv_publisher, "HEARTBEAT_S", 3600.0)
        engine.load.running = 1
        number, batch = await subscriber.message()
        while not batch[1]["running"]:  # what was on its way
            number, batch = await subscriber.message()
        for running in (2, 3):
            engine.load.running = running
            again, batch = await subscriber.message()
            number += 1
            assert (again, batch[1]["running"]) == (number, running)


async def test_topics_are_of_one_process_and_subscribers_get_no_other(subscribe: Subscribe) -> None:
    """A restarted engine may have the address, and the numbers, of the one before."""
    engine, port = FakeEngine(), free_port()
    topics = []
    for _ in range(2):
        async with publishing_of(engine, events=port) as publisher:
            assert publisher.source.events == f"tcp://{HOST}:{port}"
            topics.append(publisher.source.topic)
            subscriber = await subscribe(publisher.source.events, topics[-1])
            topic, _, _ = await subscriber.frames()
            assert topic.decode() == topics[-1]
    assert topics[0] != topics[1]


async def test_the_source_says_which_engine_publishes_where() -> None:
    engine = FakeEngine(worker_id=5)
    async with publishing_of(engine) as publisher:
        source = publisher.source
    assert source.info == engine.info
    ports = [int(address.rsplit(":", 1)[1]) for address in (source.events, source.metrics)]
    assert source.events == f"tcp://{HOST}:{ports[0]}"
    assert source.metrics == f"tcp://{HOST}:{ports[1]}"
    assert 0 < ports[0] != ports[1] > 0


async def test_publishing_works_on_ipv6(subscribe: Subscribe) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    async with publishing_of(FakeEngine(), host="::1") as publisher:
        assert publisher.source.events.startswith("tcp://[::1]:")
        await subscribe(publisher.source.events)
        await subscribe(publisher.source.metrics)


async def test_a_snapshot_of_nothing_has_a_part() -> None:
    async with publishing_of(FakeEngine()) as publisher:
        (part,) = publisher.snapshot()
        assert msgspec.msgpack.decode(part.events) == []


async def test_a_snapshot_is_of_one_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is sent part by part, and the engine goes on meanwhile."""
    monkeypatch.setattr(common.kv_publisher, "SNAPSHOT_PART_TOKENS", 6)
    decode = msgspec.msgpack.Decoder(list[BlockStored]).decode
    prompts = [[i, i, 7, 7] for i in range(10)]
    async with publishing_of(FakeEngine()) as publisher:
        publisher.publish([stored(tokens) for tokens in prompts])
        publisher.publish([BlockRemoved(block_hashes(prompts[9], 2)[1:])])
        parts = publisher.snapshot()
        got = [next(parts)]
        publisher.publish([AllBlocksCleared(), stored([1] * 8)])
        got += parts
        later = list(publisher.snapshot())
    assert [part.seq for part in got] == [1] * 5
    events = [decode(part.events) for part in got]
    assert [len(part) for part in events] == [2] * 5
    cached = {hash_ for tokens in prompts for hash_ in block_hashes(tokens, 2)}
    assert replay(event for part in events for event in part) == cached - {
        block_hashes(prompts[9], 2)[1]
    }
    assert [(part.seq, len(decode(part.events))) for part in later] == [(2, 1)]


@contextlib.contextmanager
def busy_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        listener.listen()
        port: int = listener.getsockname()[1]
        yield port


@pytest.mark.parametrize(("which", "default"), [("events", 5557), ("metrics", 5657)])
async def test_the_default_port_is_by_worker_and_gives_way(which: str, default: int) -> None:
    port = free_port()
    engine = FakeEngine(worker_id=port - default)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.kv_publisher, "HEARTBEAT_S", 3600.0)
        async with publishing_of(engine, None, None) as publisher:
            assert getattr(publisher.source, which) == f"tcp://{HOST}:{port}"
            async with publishing_of(engine, None, None) as other:
                address = getattr(other.source, which)
                assert address.startswith(f"tcp://{HOST}:")
                assert address != f"tcp://{HOST}:{port}"


@pytest.mark.parametrize("which", ["events", "metrics"])
async def test_a_port_that_was_asked_for_and_is_taken_is_an_error(which: str) -> None:
    engine, other = FakeEngine(), free_port()
    with busy_port() as busy:
        events, metrics = (busy, other) if which == "events" else (other, busy)
        with pytest.raises(ComponentError, match=f"(?i)address already in use.*{HOST}:{busy}"):
            async with publishing_of(engine, events, metrics):
                pass
    assert is_free(other)
    assert not hasattr(engine, "emit")


@pytest.mark.parametrize("port", [None, 0])
@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("192.0.2.1", r"Cannot assign requested address \(addr='tcp://192.0.2.1:"),
        ("0.0.0.0", "0.0.0.0: name one address"),  # noqa: S104 (refused)
        ("::", "::: name one address"),
    ],
)
async def test_an_address_that_routers_cannot_reach_is_an_error(
    host: str, reason: str, port: int | None
) -> None:
    with pytest.raises(ComponentError, match=f"cannot publish.*{reason}"):
        async with publishing_of(FakeEngine(), port, port, host=host):
            pass


async def test_an_engine_that_cannot_be_published_has_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Routers would take it for a silent one for ever; its process must end instead."""
    engine = FakeEngine()

    def broken() -> EngineMetrics:
        raise RuntimeError("no figures")

    monkeypatch.setattr(engine, "metrics", broken)
    async with publishing_of(engine), asyncio.timeout(PATIENCE_S):
        assert str(await engine.failed) == "no figures"


async def test_events_after_the_end_are_dropped_in_silence() -> None:
    """An engine that is being closed lets go of its blocks."""
    errors: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: errors.append(context))
    engine = FakeEngine()
    async with publishing_of(engine):
        engine.emit([stored([1, 2])])
    engine.emit([stored([3, 4])])
    handled = loop.create_future()
    loop.call_soon(handled.set_result, None)  # after all that was scheduled before it
    await handled
    assert errors == []
    assert not engine.failed.done()


def test_events_after_the_end_of_the_loop_are_dropped_in_silence() -> None:
    engine = FakeEngine()

    async def publish_nothing() -> None:
        async with publishing_of(engine):
            pass

    asyncio.run(publish_nothing())
    engine.emit([stored([1, 2])])
