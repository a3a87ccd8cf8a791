"""Keeps the selector in step with the engines: who there is, what they have cached, their load.

Of each engine that discovery lists: ask where it publishes, subscribe, ask for a snapshot, then
apply events in order. The subscription comes first, so that nothing can happen between the two.
A gap in the sequence numbers is healed by another snapshot.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from chapter4.index import UnknownBlockError
from chapter4.selector import Selector
from chapter4.workers import SILENT_AFTER_S, Worker
from common.kv import AllBlocksCleared, BlockStored, KvEventBatch, MetricsBatch
from common.protocol import from_wire
from common.protocol_router import KvSnapshotPart, KvSource
from common.telemetry import log
from common.waiting import complete_with_failure

import msgspec
import zmq
import zmq.asyncio
from dynamo.runtime import Client, DistributedRuntime

DISCOVERY_CHECK_S = 0.1  # the runtime's client knows of changes, but tells nobody
RETRY_S = 0.5
MAX_SOCKETS = 16384  # two for each engine; ZMQ's own limit is 1023

_decode_snapshot = msgspec.msgpack.Decoder(list[BlockStored]).decode
_decode_events = msgspec.msgpack.Decoder(KvEventBatch).decode
_decode_metrics = msgspec.msgpack.Decoder(MetricsBatch).decode

T = TypeVar("T")


class EventsEndedError(Exception):
    """Not even empty batches come any more: the connection is dead, though perhaps not known so."""


class Feed:
    """Feeds `selector` while its block lasts, or until it `failed`; see `following`."""

    def __init__(
        self, selector: Selector, engines: Client, sources: Client, snapshots: Client
    ) -> None:
        self.selector = selector
        self._engines, self._sources, self._snapshots = engines, sources, snapshots
        self.failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self._context = zmq.asyncio.Context()
        self._context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
        self._tasks: dict[int, asyncio.Task[None]] = {}

    async def follow_discovery(self) -> None:
        """Follow every engine that is listed and forget those that no longer are."""
        while True:
            clients = self._engines, self._sources, self._snapshots
            listed = set[int].intersection(*[set(client.instance_ids()) for client in clients])
            for instance in listed - self._tasks.keys():
                self._tasks[instance] = asyncio.create_task(self._follow(instance))
            for instance in self._tasks.keys() - listed:
                log.info("engine instance %x left", instance)
                await self._stop(instance)
            await asyncio.sleep(DISCOVERY_CHECK_S)

    async def close(self) -> None:
        for instance in list(self._tasks):
            await self._stop(instance)
        self._context.destroy(linger=0)

    async def _stop(self, instance: int) -> None:
        task = self._tasks.pop(instance)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        self.selector.remove(instance)

    async def _follow(self, instance: int) -> None:
        while True:
            try:
                await self._follow_once(instance)
            except Exception as error:
                cause = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
                log.warning("engine instance %x: %s; trying again", instance, cause)
                if not isinstance(cause, EventsEndedError):
                    self.selector.fail(instance)
                    await asyncio.sleep(RETRY_S)

    async def _follow_once(self, instance: int) -> None:
        (source,) = await ask(self._sources, instance, KvSource)
        worker = self.selector.workers.get(instance)
        if worker is None:
            worker = self.selector.workers[instance] = Worker(instance, source)
            role = set() if source.role == "aggregated" else {source.role}
            worker.tags = frozenset(source.tags) | role
        with (
            self._subscribe(source, source.events) as events,
            self._subscribe(source, source.metrics) as metrics,
        ):
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._follow_metrics(worker, metrics))
                tasks.create_task(self._follow_events(worker, events))

    def _subscribe(self, source: KvSource, address: str) -> zmq.asyncio.Socket:
        socket: zmq.asyncio.Socket = self._context.socket(zmq.SUB)
        socket.linger = 0
        socket.ipv6 = True  # takes IPv4 addresses, too
        socket.subscribe(source.topic)
        socket.connect(address)
        return socket

    async def _follow_metrics(self, worker: Worker, socket: zmq.asyncio.Socket) -> None:
        while True:
            _, _, payload = await socket.recv_multipart()
            metrics, now = _decode_metrics(payload).metrics, time.monotonic()
            worker.hear(metrics, now)
            in_engine = metrics.running + metrics.waiting
            for request_id in self.selector.active.reconcile(worker.instance, in_engine, now):
                self.selector.health.ended(worker.instance, request_id)
            self.selector.changed()

    async def _follow_events(self, worker: Worker, socket: zmq.asyncio.Socket) -> None:
        while True:
            seq = await self._load_snapshot(worker)
            while True:
                if not await socket.poll(SILENT_AFTER_S * 1e3):
                    raise EventsEndedError(f"no events for {SILENT_AFTER_S:g} s")
                _, number, payload = await socket.recv_multipart()
                if not worker.synced:  # a request to it failed, but it is alive
                    break
                expected, seq = seq + 1, int.from_bytes(number, "big", signed=True)
                if seq < expected:
                    seq = expected - 1  # the snapshot has it
                    continue
                if seq > expected:
                    log.warning("worker %d: missed events %d to %d; taking a snapshot",
                                worker.source.info.worker_id, expected, seq - 1)  # fmt: skip
                    break
                events = _decode_events(payload).events
                if any(isinstance(event, AllBlocksCleared) for event in events):
                    worker.expect_nothing()
                try:
                    worker.settle(self.selector.index.apply(worker.instance, events))
                except UnknownBlockError as error:
                    log.warning("worker %d: %s; taking a snapshot",
                                worker.source.info.worker_id, error)  # fmt: skip
                    break

    async def _load_snapshot(self, worker: Worker) -> int:
        """Begin anew with what the engine has cached now; the number of the last event in it."""
        index = self.selector.index
        while True:
            failures = worker.failures
            parts = await ask(self._snapshots, worker.instance, KvSnapshotPart)
            index.remove(worker.instance)
            worker.expect_nothing()
            for part in parts:
                index.apply(worker.instance, _decode_snapshot(part.events))
                await asyncio.sleep(0)  # decisions go on meanwhile
                if worker.failures != failures:
                    break
            if worker.failures == failures:
                break  # else the snapshot is older than the failure, and no sign of life
        worker.synced, worker.failed, worker.heard = True, False, time.monotonic()
        self.selector.changed()
        log.info("worker %d: %d blocks cached", worker.source.info.worker_id,
                 index.block_count(worker.instance))  # fmt: skip
        return parts[0].seq


async def ask(client: Client, instance: int, answer: type[T]) -> list[T]:
    """The items that an instance answers with, at least one.

    Raises:
        Exception: what the runtime raised, or the answer was not what it should be.
    """
    stream = await client.direct({}, instance, annotated=False)
    items = [from_wire(item, answer) async for item in stream]
    if not items:
        raise RuntimeError("the engine gave no answer")
    return items


@asynccontextmanager
async def following(
    runtime: DistributedRuntime, namespace: str, selector: Selector
) -> AsyncIterator[Feed]:
    """Feed `selector` with the engines of a namespace for the length of the block."""
    clients: list[Any] = [
        await runtime.endpoint(f"{namespace}.engine.{endpoint}").client()
        for endpoint in ("generate", "kv_source", "kv_snapshot")
    ]
    feed = Feed(selector, *clients)
    task = asyncio.create_task(feed.follow_discovery())
    task.add_done_callback(lambda task: complete_with_failure(feed.failed, task))
    try:
        yield feed
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await feed.close()
