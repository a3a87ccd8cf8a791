"""KV blocks: chained hashes and the events that tell a router what an engine has cached.

The structs below are the wire format that vLLM and SGLang emit (msgpack arrays, the tag
first), so a router cannot tell the backends apart. Hashes are signed 64-bit integers.
"""

import hashlib
import struct
from collections.abc import Sequence

from common.protocol import EngineMetrics

import msgspec


class BlockStored(msgspec.Struct, array_like=True, tag=True):
    """Consecutive full blocks are now cached; `token_ids` holds those of all of them."""

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None


class BlockRemoved(msgspec.Struct, array_like=True, tag=True):
    """Blocks are no longer cached."""

    block_hashes: list[int]


class AllBlocksCleared(msgspec.Struct, array_like=True, tag=True):
    """The whole cache is empty."""


KvEvent = BlockStored | BlockRemoved | AllBlocksCleared


class KvEventBatch(msgspec.Struct, array_like=True):
    """What happened in a cache since the last batch, in order; `ts` is in seconds since 1970."""

    ts: float
    events: list[KvEvent]
    data_parallel_rank: int | None = None


class MetricsBatch(msgspec.Struct, array_like=True):
    """An engine's load, in the frame of an event batch."""

    ts: float
    metrics: EngineMetrics
    data_parallel_rank: int | None = None


def block_hash(parent: int | None, token_ids: Sequence[int]) -> int:
    """The hash of a block and everything before it, equal on every worker and every run."""
    key = b"" if parent is None else struct.pack("<q", parent)
    digest = hashlib.blake2b(
        struct.pack(f"<{len(token_ids)}I", *token_ids), key=key, digest_size=8
    ).digest()
    return int.from_bytes(digest, "little", signed=True)


def block_hashes(token_ids: Sequence[int], block_size: int) -> list[int]:
    """The chained hashes of the full blocks of a sequence; a partial last block has none."""
    hashes: list[int] = []
    parent: int | None = None
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        parent = block_hash(parent, token_ids[start : start + block_size])
        hashes.append(parent)
    return hashes
