"""Dynamo's own `KvRouter` and `SelectionService` as routers of a replay, in this process.

They have their default configuration; by it neither has a queue that would wait in real time,
nor loads that decay with it. All that counts tokens is 16 times smaller for them, so that less
has to be copied: a trace's block of 512 tokens is one of 32, its hash id over and over. Their
cost counts blocks and parts of them, and stays the same up to a 32nd of a block.

A decision comes when the peer has all events that were sent before: each engine that had any
sends a block that is in no prompt, and the peer is asked until it has that one, too. Of equal
engines both draw one, and no seed can be given for that.
"""

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Any, Protocol

from benchmarks.report import GuardError
from benchmarks.router_fleet import MODEL
from benchmarks.router_peers import PeerUnavailableError, subscribed_router, subscribed_service
from benchmarks.trace import BLOCK_SIZE as TRACE_BLOCK_SIZE
from benchmarks.trace import TraceRequest
from benchmarks.trace_engine import EngineSettings, Running, TraceEngine
from common.kv import BlockRemoved, BlockStored, KvEvent, KvEventBatch
from launch.servers import check_nats

import msgspec
import zmq.asyncio
from dynamo.llm import KvEventPublisher, KvRouter, SelectionService

ANSWER_TIMEOUT_S = 30.0
CHECK_S = 0.0005
SMALLER = 16
BLOCK_SIZE = TRACE_BLOCK_SIZE // SMALLER
LARGEST_TOKEN = 2**32 - 1

_encode = msgspec.msgpack.Encoder().encode
_replays = itertools.count()


class Peer(Protocol):
    """Engines are numbered from 1."""

    async def choose(self, request_id: str, tokens: list[int]) -> int: ...
    async def first_token(self, request_id: str) -> None: ...
    async def finished(self, request_id: str) -> None: ...
    async def publish(self, instance: int, events: list[KvEvent]) -> None: ...
    async def who_has(self, tokens: list[int]) -> set[int]: ...


class KvRouterPeer:
    """Its engines are the ranks, from 0, of one instance."""

    def __init__(self, router: KvRouter, publishers: dict[int, KvEventPublisher]) -> None:
        self._router = router
        self._publishers = publishers

    async def choose(self, request_id: str, tokens: list[int]) -> int:
        _, rank, _ = await self._router.best_worker(tokens, request_id=request_id)
        return rank + 1

    async def first_token(self, request_id: str) -> None:
        await self._router.mark_prefill_complete(request_id)

    async def finished(self, request_id: str) -> None:
        await self._router.free(request_id)

    async def publish(self, instance: int, events: list[KvEvent]) -> None:
        publisher = self._publishers[instance]
        for event in events:
            if isinstance(event, BlockStored):
                publisher.publish_stored(
                    event.token_ids,
                    [BLOCK_SIZE] * len(event.block_hashes),
                    event.block_hashes,
                    event.parent_block_hash,
                )
            elif isinstance(event, BlockRemoved):
                publisher.publish_removed(event.block_hashes)

    async def who_has(self, tokens: list[int]) -> set[int]:
        found: Any = await self._router.get_overlap_scores(tokens)
        return {each["dp_rank"] + 1 for each in found["workers"] if each["device_blocks"]}


class SelectionServicePeer:
    def __init__(
        self, service: SelectionService, publishers: dict[int, zmq.asyncio.Socket]
    ) -> None:
        self._service = service
        self._publishers = publishers
        self._sent = dict.fromkeys(publishers, 0)

    async def choose(self, request_id: str, tokens: list[int]) -> int:
        found: Any = await self._service.select_and_reserve(
            {"model_name": MODEL, "token_ids": tokens, "selection_id": request_id}
        )
        return int(found["worker_id"])

    async def first_token(self, request_id: str) -> None:
        await self._service.prefill_complete(request_id)

    async def finished(self, request_id: str) -> None:
        await self._service.free_reservation(request_id)

    async def publish(self, instance: int, events: list[KvEvent]) -> None:
        number = self._sent[instance].to_bytes(8, "big")
        self._sent[instance] += 1
        batch = _encode(KvEventBatch(0.0, events))
        await self._publishers[instance].send_multipart([b"", number, batch])

    async def who_has(self, tokens: list[int]) -> set[int]:
        found: Any = await self._service.overlap_scores({"model_name": MODEL, "token_ids": tokens})
        return {each["worker_id"] for each in found["workers"] if each["device_blocks"]}


class PeerRouter:
    """A peer in virtual time: it is told what has happened when it is asked to choose."""

    def __init__(self, runner: asyncio.Runner, peer: Peer) -> None:
        self._runner = runner
        self._peer = peer
        self._events: dict[int, list[KvEvent]] = {}  # not sent yet, by engine from 1
        self._reports: list[Callable[[], Awaitable[None]]] = []
        self._marks = itertools.count()
        self.events_applied = 0

    def choose(self, running: Running, engines: Sequence[TraceEngine], now: float) -> int:
        return self._runner.run(self._choose(running))

    def metrics(self, engine: TraceEngine, now: float) -> None:
        """Neither decides by what engines say of their load."""

    def first_token(self, running: Running, now: float) -> None:
        self._reports.append(lambda: self._peer.first_token(running.id))

    def finished(self, running: Running, now: float) -> None:
        self._reports.append(lambda: self._peer.finished(running.id))

    def stored(self, instance: int, request: TraceRequest, first: int) -> None:
        blocks = request.full_blocks
        parent = blocks[first - 1] if first else None
        event = BlockStored(blocks[first:], parent, tokens_of(blocks[first:]), BLOCK_SIZE)
        self._events.setdefault(instance + 1, []).append(event)

    def removed(self, instance: int, blocks: list[int]) -> None:
        self._events.setdefault(instance + 1, []).append(BlockRemoved(blocks))

    async def _choose(self, running: Running) -> int:
        tokens = prompt_of(running.request)
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                for report in self._reports:
                    await report()
                self._reports.clear()
                await self._publish()
                return await self._peer.choose(running.id, tokens) - 1
        except TimeoutError as error:
            raise GuardError(
                f"no decision within {ANSWER_TIMEOUT_S:.0f} s, with all events sent"
            ) from error

    async def _publish(self) -> None:
        """Send the engines' events, and wait until all are applied."""
        if not self._events:
            return
        mark = next(self._marks)
        tokens = tokens_of([LARGEST_TOKEN - mark])
        name = -1 - mark  # blocks of the trace have names from 0
        for instance, events in self._events.items():
            marked = BlockStored([name], None, tokens, BLOCK_SIZE)
            await self._peer.publish(instance, [*events, marked])
            self.events_applied += len(events)
        missing = set(self._events)
        while missing:
            missing -= await self._peer.who_has(tokens)
            if missing:
                await asyncio.sleep(CHECK_S)
        for instance in self._events:
            await self._peer.publish(instance, [BlockRemoved([name])])
        self._events.clear()


def tokens_of(blocks: Sequence[int]) -> list[int]:
    return [token for block in blocks for token in [block] * BLOCK_SIZE]


def prompt_of(request: TraceRequest) -> list[int]:
    tokens = tokens_of(request.full_blocks)
    rest = request.input_length % TRACE_BLOCK_SIZE // SMALLER
    return (tokens + request.hash_ids[-1:] * rest) or [LARGEST_TOKEN]


@asynccontextmanager
async def kv_router_peer(workers: int, settings: EngineSettings) -> AsyncIterator[Peer]:
    check_nats(os.environ["NATS_SERVER"])  # the runtime would wait for it for ever
    async with subscribed_router(
        range(1, workers + 1),
        BLOCK_SIZE,
        settings.cache_blocks,
        settings.prefill_chunk // SMALLER,
        f"trace-{os.getpid()}-{next(_replays)}",
        settings.max_running,
    ) as (router, publishers):
        yield KvRouterPeer(router, publishers)


@asynccontextmanager
async def selection_service_peer(workers: int, settings: EngineSettings) -> AsyncIterator[Peer]:
    async with subscribed_service(
        range(1, workers + 1), BLOCK_SIZE, settings.cache_blocks, settings.prefill_chunk // SMALLER
    ) as (service, publishers):
        yield SelectionServicePeer(service, publishers)


PEERS: dict[str, Callable[[int, EngineSettings], AbstractAsyncContextManager[Peer]]] = {
    "KvRouter": kv_router_peer,
    "SelectionService": selection_service_peer,
}


@contextmanager
def peer_router(name: str, workers: int, settings: EngineSettings) -> Iterator[PeerRouter]:
    """One of `PEERS`, ready to be asked; `KvRouter` needs `NATS_SERVER`.

    Raises:
        PeerUnavailableError: it cannot be run.
    """
    with asyncio.Runner() as runner:
        opened = PEERS[name](workers, settings)
        try:
            peer = runner.run(opened.__aenter__())
        except Exception as error:
            raise PeerUnavailableError(f"{type(error).__name__}: {error}") from error
        try:
            yield PeerRouter(runner, peer)
        finally:
            runner.run(opened.__aexit__(None, None, None))
