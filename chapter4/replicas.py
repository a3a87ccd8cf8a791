"""Several routers that know of each other's decisions.

Every router hears all engines. What it does not hear is what the other routers send to them, and
the reports of processors, each of which goes to one router. So routers tell each other, as engines
tell routers: each publishes over ZMQ, and follows every other one that discovery lists. Of one that
it meets, or of which it missed something, it asks a snapshot. What one router knew, another one
knows: when one is killed, nothing is lost.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from chapter4.feed import DISCOVERY_CHECK_S, RETRY_S, EventsEndedError, ask
from chapter4.replica_state import ReplicaState
from chapter4.selector import Selector
from chapter4.workers import SILENT_AFTER_S
from common.kv_publisher import HEARTBEAT_S
from common.protocol import to_wire
from common.protocol_replicas import (
    ReplicaBatch,
    ReplicaMessage,
    ReplicaSnapshotPart,
    ReplicaSource,
)
from common.protocol_routing import PolicyRequest
from common.telemetry import log
from common.waiting import complete_with_failure

import msgspec
import zmq
import zmq.asyncio
from dynamo.runtime import Client, Context

SNAPSHOT_PART_MESSAGES = 256
ANSWER_S = 3.0

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(ReplicaBatch).decode


@dataclass(frozen=True)
class Others:
    """How to find the other routers, and which one is our `own`."""

    own: int
    sources: Client
    snapshots: Client


class Replicas:
    """Made by `sharing`; belongs to one event loop."""

    def __init__(
        self, state: ReplicaState, publisher: "zmq.Socket[bytes]", address: str, others: Others
    ) -> None:
        self.state = state
        self._others = others
        self.source = ReplicaSource(state.topic, address)
        self._publisher = publisher
        self._seq = -1
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._context = zmq.asyncio.Context()

    def tell(self, *messages: ReplicaMessage) -> None:
        """Tell all other routers."""
        self._seq += 1
        frames = [self.source.topic.encode(), self._seq.to_bytes(8, "big")]
        self._publisher.send_multipart(
            [*frames, _encode(ReplicaBatch(list(messages)))], zmq.NOBLOCK
        )

    async def serve_source(
        self, request: Any, context: Context
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The endpoint `router.replica_source`."""
        yield to_wire(self.source)

    async def serve_snapshot(
        self, request: Any, context: Context
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The endpoint `router.replica_snapshot`."""
        seq, messages = self._seq, self.state.snapshot(time.monotonic())
        for start in range(0, max(len(messages), 1), SNAPSHOT_PART_MESSAGES):
            batch = ReplicaBatch(messages[start : start + SNAPSHOT_PART_MESSAGES])
            yield to_wire(ReplicaSnapshotPart(seq, _encode(batch)))

    async def keep_alive(self) -> None:
        """Show the others that this one lives, and how much they must have heard."""
        while True:
            self.tell()
            await asyncio.sleep(HEARTBEAT_S)

    async def follow_discovery(self) -> None:
        """Follow every other router that is listed; never returns."""
        others = self._others
        while True:
            listed = set(others.sources.instance_ids()) & set(others.snapshots.instance_ids())
            for instance in listed - self._tasks.keys() - {others.own}:
                self._tasks[instance] = asyncio.create_task(self._follow(instance))
            for instance in self._tasks.keys() - listed:
                log.info("router instance %x left", instance)
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

    async def _follow(self, instance: int) -> None:
        while True:
            try:
                async with asyncio.timeout(ANSWER_S):
                    (source,) = await ask(self._others.sources, instance, ReplicaSource)
                with self._context.socket(zmq.SUB) as socket:
                    socket.linger = 0
                    socket.ipv6 = True  # takes IPv4 addresses, too
                    socket.subscribe(source.topic)
                    socket.connect(source.address)
                    while True:
                        await self._follow_from_snapshot(instance, source, socket)
            except Exception as error:
                log.warning("router instance %x: %r; trying again", instance, error)
                await asyncio.sleep(RETRY_S)

    async def _follow_from_snapshot(
        self, instance: int, source: ReplicaSource, socket: zmq.asyncio.Socket
    ) -> None:
        """Return when something was missed."""
        async with asyncio.timeout(ANSWER_S):
            parts = await ask(self._others.snapshots, instance, ReplicaSnapshotPart)
        messages = [message for part in parts for message in _decode(part.batch).messages]
        self.state.load(source.topic, messages, time.monotonic())
        log.info("router instance %x: %d messages of its snapshot", instance, len(messages))
        seq = parts[0].seq
        while True:
            if not await socket.poll(SILENT_AFTER_S * 1e3):
                raise EventsEndedError(f"nothing for {SILENT_AFTER_S:g} s")
            _, number, payload = await socket.recv_multipart()
            expected, seq = seq + 1, int.from_bytes(number, "big")
            if seq > expected:
                log.warning("router instance %x: missed batches %d to %d; taking a snapshot",
                            instance, expected, seq - 1)  # fmt: skip
                return
            if seq < expected:
                seq = expected - 1  # the snapshot has it
                continue
            for message in _decode(payload).messages:
                self.state.apply(source.topic, message, time.monotonic())


@asynccontextmanager
async def sharing(
    selector: Selector,
    change_policy: Callable[[Selector, PolicyRequest], None],
    host: str,
    others: Others,
    failed: asyncio.Future[BaseException],
) -> AsyncIterator[Replicas]:
    """Share decisions with the other routers for the length of the block, or until that `failed`.

    `host` is the address of this machine at which others reach it.
    """
    with zmq.Context() as context, context.socket(zmq.PUB) as publisher:
        publisher.linger = 0
        publisher.ipv6 = ":" in host
        publisher.bind(f"tcp://[{host}]:*" if ":" in host else f"tcp://{host}:*")
        address = publisher.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
        replicas = Replicas(ReplicaState(selector, change_policy), publisher, address, others)
        tasks = [
            asyncio.create_task(replicas.keep_alive()),
            asyncio.create_task(replicas.follow_discovery()),
        ]
        for task in tasks:
            task.add_done_callback(lambda task: complete_with_failure(failed, task))
        selector.tell = replicas.tell
        try:
            yield replicas
        finally:
            selector.tell = lambda message: None
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await replicas.close()
