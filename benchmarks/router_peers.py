"""Dynamo's own ways to choose an engine, given the same engines with the same blocks.

Both run in this process; `KvRouter` hears of events through NATS, `SelectionService` over ZMQ.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from benchmarks.router_fleet import BLOCK_SIZE, MODEL, Cached, Fleet
from common.kv import BlockStored, KvEventBatch

import msgspec
import zmq
import zmq.asyncio
from dynamo.llm import (
    KvEventPublisher,
    KvRouter,
    KvRouterConfig,
    ModelInput,
    ModelRuntimeConfig,
    ModelType,
    SelectionService,
    WorkerType,
    register_model,
)
from dynamo.runtime import DistributedRuntime

FILL_TIMEOUT_S = 60.0
CHECK_S = 0.1
MAX_BATCHED_TOKENS = 8192

_decode = msgspec.msgpack.Decoder(KvEventBatch).decode


class PeerUnavailableError(Exception):
    """The peer cannot be compared with; the message says why."""


@asynccontextmanager
async def subscribed_service(
    instances: Sequence[int], block_size: int, total_kv_blocks: int, max_batched_tokens: int
) -> AsyncIterator[tuple[SelectionService, dict[int, zmq.asyncio.Socket]]]:
    """A `SelectionService`, and for each engine the ZMQ socket whose events it takes.

    Raises:
        PeerUnavailableError: it did not subscribe to all in time.
    """
    service = SelectionService(indexer_threads=2)
    context = zmq.asyncio.Context()
    context.set(zmq.MAX_SOCKETS, 2 * len(instances) + 8)
    publishers: dict[int, zmq.asyncio.Socket] = {}
    try:
        for instance in instances:
            publisher = publishers[instance] = context.socket(zmq.XPUB)  # sees who subscribes
            publisher.sndhwm = 0
            publisher.linger = 0
            port = publisher.bind_to_random_port("tcp://127.0.0.1")
            await service.upsert_worker(
                {
                    "worker_id": instance,
                    "model_name": MODEL,
                    "endpoint": f"http://worker-{instance}",
                    "block_size": block_size,
                    "total_kv_blocks": total_kv_blocks,
                    "max_num_batched_tokens": max_batched_tokens,
                    "kv_events_endpoint": f"tcp://127.0.0.1:{port}",
                }
            )
        try:
            async with asyncio.timeout(FILL_TIMEOUT_S):
                for publisher in publishers.values():
                    await publisher.recv()
        except TimeoutError as error:
            raise PeerUnavailableError("it did not subscribe to all engines in time") from error
        yield service, publishers
    finally:
        service.shutdown()
        context.destroy(linger=0)


@asynccontextmanager
async def selection_service(fleet: Fleet) -> AsyncIterator[SelectionService]:
    """A `SelectionService` that has taken every message of the fleet over ZMQ.

    Raises:
        PeerUnavailableError: it did not take them in time.
    """
    async with subscribed_service(
        fleet.instances, BLOCK_SIZE, 2 * fleet.blocks_each, MAX_BATCHED_TOKENS
    ) as (service, publishers):
        sent = dict.fromkeys(publishers, 0)
        for instance, message in fleet.messages:
            number = sent[instance].to_bytes(8, "big")
            await publishers[instance].send_multipart([b"", number, message])
            sent[instance] += 1

        async def overlap(cached: Cached) -> int:
            found = await service.overlap_scores(
                {"model_name": MODEL, "token_ids": cached.token_ids}
            )
            return _blocks(found, "worker_id", cached.instance)

        await _until_filled(fleet, overlap)
        yield service


@asynccontextmanager
async def subscribed_router(
    instances: Sequence[int],
    block_size: int,
    total_kv_blocks: int,
    max_batched_tokens: int,
    namespace: str,
    max_running: int = 32,
) -> AsyncIterator[tuple[KvRouter, dict[int, KvEventPublisher]]]:
    """A `KvRouter`, and for each engine, from 1, what publishes the events that it takes.

    Its workers are the data-parallel ranks, from 0, of one instance: it chooses among these
    like among instances, and they need no process each. Who shares a NATS server with others
    takes a namespace of its own.

    Raises:
        PeerUnavailableError: it did not subscribe to all in time.
    """
    loop = asyncio.get_running_loop()
    runtime = DistributedRuntime(loop, "mem", "tcp", event_plane="nats")
    endpoint = runtime.endpoint(f"{namespace}.engine.generate")

    async def generate(request: Any, context: Any) -> AsyncIterator[dict[str, Any]]:
        yield {}

    serving = asyncio.ensure_future(endpoint.serve_endpoint(generate))
    try:
        await (await endpoint.client()).wait_for_instances()
        config = ModelRuntimeConfig()
        config.total_kv_blocks = total_kv_blocks
        config.max_num_seqs = max_running
        config.max_num_batched_tokens = max_batched_tokens
        config.data_parallel_size = len(instances)
        config.enable_local_indexer = True  # from which the router gets what it has missed
        await register_model(
            ModelInput.Tokens,
            ModelType.Chat,
            endpoint,
            MODEL,
            MODEL,
            worker_type=WorkerType.Aggregated,
            kv_cache_block_size=block_size,
            runtime_config=config,
            skip_model_assets=True,
        )
        router = KvRouter(endpoint, block_size, KvRouterConfig())
        publishers = {
            instance: KvEventPublisher(
                endpoint, kv_block_size=block_size, dp_rank=instance - 1, enable_local_indexer=True
            )
            for instance in instances
        }
        await _until_subscribed(router, publishers, block_size)
        yield router, publishers
    finally:
        runtime.shutdown()
        await asyncio.gather(serving, return_exceptions=True)


@asynccontextmanager
async def kv_router(fleet: Fleet) -> AsyncIterator[KvRouter]:
    """A `KvRouter` that has taken every message of the fleet over Dynamo's event plane.

    Raises:
        PeerUnavailableError: it did not take them in time.
    """
    async with subscribed_router(
        fleet.instances, BLOCK_SIZE, 2 * fleet.blocks_each, MAX_BATCHED_TOKENS, "benchmark"
    ) as (router, publishers):
        for instance, message in fleet.messages:
            for event in _decode(message).events:
                assert isinstance(event, BlockStored)
                publishers[instance].publish_stored(
                    event.token_ids,
                    [BLOCK_SIZE] * len(event.block_hashes),
                    event.block_hashes,
                    event.parent_block_hash,
                )
            await asyncio.sleep(0)

        async def overlap(cached: Cached) -> int:
            return await _rank_overlap(router, cached.token_ids, cached.instance)

        await _until_filled(fleet, overlap)
        yield router


async def _until_subscribed(
    router: KvRouter, publishers: dict[int, KvEventPublisher], block_size: int
) -> None:
    """Send each engine's first event until it arrives: what nobody is subscribed to is lost."""
    deadline = time.monotonic() + FILL_TIMEOUT_S
    missing = dict(publishers)
    while missing:
        if time.monotonic() > deadline:
            raise PeerUnavailableError(f"it subscribed to all but {len(missing)} engines")
        for instance, publisher in missing.items():
            publisher.publish_stored([instance] * block_size, [block_size], [instance])
        await asyncio.sleep(CHECK_S)
        for instance in list(missing):
            if await _rank_overlap(router, [instance] * block_size, instance):
                missing.pop(instance).publish_removed([instance])


async def _rank_overlap(router: KvRouter, token_ids: list[int], instance: int) -> int:
    return _blocks(await router.get_overlap_scores(token_ids), "dp_rank", instance - 1)


def _blocks(overlap_scores: Any, key: str, value: int) -> int:
    workers = overlap_scores["workers"]
    return sum(worker["device_blocks"] for worker in workers if worker[key] == value)


async def _until_filled(fleet: Fleet, overlap: Callable[[Cached], Awaitable[int]]) -> None:
    """Wait until all of the sample is known; an engine's messages are taken in order.

    Raises:
        PeerUnavailableError: it is not in time.
    """
    deadline = time.monotonic() + FILL_TIMEOUT_S
    for cached in fleet.sample:
        while await overlap(cached) < len(cached.token_ids) // BLOCK_SIZE:
            if time.monotonic() > deadline:
                raise PeerUnavailableError(f"it lacks blocks after {FILL_TIMEOUT_S:.0f} s")
            await asyncio.sleep(CHECK_S)
