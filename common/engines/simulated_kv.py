"""KV that moves between simulated engines: only the time that it takes."""

import asyncio
from dataclasses import dataclass

from common.engines.block_cache import BlockCache
from common.engines.scheduled_request import ScheduledRequest
from common.kv import block_hashes
from common.protocol import EngineOutput
from common.protocol_transfer import KvDescriptor

KIND = "simulated"


@dataclass(frozen=True)
class SimulatedKv:
    """A `ReceivedKv`."""

    first: int
    tokens: int


def hand_over(request: ScheduledRequest, worker_id: int, token_ids: list[int]) -> EngineOutput:
    """The item with which another engine is to go on."""
    item = request.item(worker_id, token_ids, handed_over=True)
    item.kv = KvDescriptor(KIND, len(request.tokens) - 1)  # the last one has not been computed
    return item


async def receive(
    request: ScheduledRequest, kv: KvDescriptor, cache: BlockCache, tokens_per_s: float
) -> None:
    """Wait as long as the blocks that are not cached here take to arrive."""
    if kv.kind != KIND or not 0 < kv.tokens < len(request.tokens):
        return  # of another backend: to be computed
    size = cache.block_size
    cached = len(cache.match(request.tokens, block_hashes(request.tokens, size)))
    if cached * size < kv.tokens:
        await asyncio.sleep((kv.tokens - cached * size) / tokens_per_s)
        request.received = SimulatedKv(cached, kv.tokens)
