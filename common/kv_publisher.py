"""An engine's side of the router: KV events and load over ZMQ, and snapshots for who came late.

Frames of a message: topic, sequence number (8 bytes, big-endian), payload (msgpack), as vLLM and
SGLang send them. A PUB socket loses what a subscriber cannot take and knows nothing of one that
comes late; sequence numbers make both visible, and a snapshot heals them.
"""

import asyncio
import contextlib
import errno
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence

from common.engines.base import Engine
from common.errors import ComponentError
from common.kv import BlockStored, KvEvent, KvEventBatch, MetricsBatch
from common.kv_arguments import zmq_host
from common.kv_mirror import KvMirror
from common.protocol import EngineMetrics
from common.protocol_router import KvSnapshotPart, KvSource
from common.telemetry import log
from common.waiting import complete_with_failure

import msgspec
import zmq

METRICS_INTERVAL_S = 0.05  # while the load changes
HEARTBEAT_S = 0.5
SNAPSHOT_PART_TOKENS = 65536


class KvPublisher:
    """Made by `publishing`, which lets it publish; belongs to one event loop."""

    def __init__(
        self,
        engine: Engine,
        events: zmq.Socket[bytes],
        metrics: zmq.Socket[bytes],
        tags: Sequence[str] = (),
    ) -> None:
        # A topic of its own, because a restarted engine may have the address of the one before.
        topic = f"kv@{uuid.uuid4().hex}"
        self.source = KvSource(engine.info, topic, _address(events), _address(metrics), list(tags))
        self._engine = engine
        self._topic = topic.encode()
        self._events, self._metrics = events, metrics
        self._encoder = msgspec.msgpack.Encoder()
        self._mirror = KvMirror()
        self._seq = -1

    def publish(self, events: list[KvEvent]) -> None:
        """Send one batch and count it."""
        self._seq += 1
        self._mirror.apply(events)
        self._send(self._events, self._seq, KvEventBatch(time.time(), events))

    def snapshot(self) -> Iterator[KvSnapshotPart]:
        """The cache as it is now, in parts that fit into messages; at least one."""
        seq, parts, tokens = self._seq, list[list[BlockStored]]([[]]), 0
        for event in self._mirror.events():
            if tokens >= SNAPSHOT_PART_TOKENS:
                parts.append([])
                tokens = 0
            parts[-1].append(event)
            tokens += len(event.token_ids)
        return (KvSnapshotPart(seq, self._encoder.encode(part)) for part in parts)

    async def keep_publishing(self) -> None:
        """Send the load when it changes, and both streams' signs of life; never returns.

        An empty batch of events has a number, too: who missed the last one before a quiet time
        learns it from that.
        """
        sent: EngineMetrics | None = None
        sent_at, number, seq = 0.0, 0, self._seq
        while True:
            load = self._engine.metrics()
            quiet = time.monotonic() - sent_at >= HEARTBEAT_S
            if load != sent or quiet:
                self._send(self._metrics, number, MetricsBatch(time.time(), load))
                sent, number = load, number + 1
            if quiet:
                if seq == self._seq:
                    self.publish([])
                sent_at, seq = time.monotonic(), self._seq
            await asyncio.sleep(METRICS_INTERVAL_S)

    def _send(self, socket: "zmq.Socket[bytes]", seq: int, batch: msgspec.Struct) -> None:
        payload = self._encoder.encode(batch)
        socket.send_multipart([self._topic, seq.to_bytes(8, "big"), payload], zmq.NOBLOCK)


@contextlib.asynccontextmanager
async def publishing(
    engine: Engine,
    host: str,
    events_port: int | None,
    metrics_port: int | None,
    tags: Sequence[str] = (),
) -> AsyncIterator[KvPublisher]:
    """Publish what `engine` caches and how busy it is; begin before its first request.

    A port of 0 takes a free one; None takes 5557 (events) or 5657 (metrics) + worker id, or a
    free one if that is taken.

    Raises:
        ComponentError: the address is taken, not this machine's, or not one to connect to.
    """
    loop = asyncio.get_running_loop()
    worker_id = engine.info.worker_id
    with contextlib.ExitStack() as stack:
        context = stack.enter_context(zmq.Context())
        events = stack.enter_context(context.socket(zmq.PUB))
        metrics = stack.enter_context(context.socket(zmq.PUB))
        _bind(events, host, events_port, 5557 + worker_id)
        _bind(metrics, host, metrics_port, 5657 + worker_id)
        publisher = KvPublisher(engine, events, metrics, tags)

        def publish(batch: list[KvEvent]) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(publish_now, batch)

        def publish_now(batch: list[KvEvent]) -> None:
            if not events.closed:  # an engine that is being closed has events, too
                publisher.publish(batch)

        engine.subscribe(publish)
        log.info("KV events on %s, load on %s", publisher.source.events, publisher.source.metrics)
        task = asyncio.create_task(publisher.keep_publishing())
        task.add_done_callback(lambda task: complete_with_failure(engine.failed, task))
        try:
            yield publisher
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def _bind(socket: "zmq.Socket[bytes]", host: str, port: int | None, default: int) -> None:
    socket.linger = 0
    socket.ipv6 = ":" in host
    host = zmq_host(host, "publish")
    try:
        socket.bind(f"tcp://{host}:{default if port is None else port or '*'}")
    except zmq.ZMQError as error:
        if port is None and error.errno == errno.EADDRINUSE:
            socket.bind(f"tcp://{host}:*")
            return
        raise ComponentError(f"cannot publish: {error}") from error


def _address(socket: "zmq.Socket[bytes]") -> str:
    return str(socket.getsockopt_string(zmq.LAST_ENDPOINT)).rstrip("\0")
