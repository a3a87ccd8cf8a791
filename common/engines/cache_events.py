"""The KV events of a block cache, as few as tell the same."""

from collections.abc import Sequence

from common.engines.blocks import Block
from common.kv import BlockRemoved, BlockStored, KvEvent


def add_stored(events: list[KvEvent], blocks: Sequence[Block], block_size: int) -> None:
    """Add the event that a run of consecutive blocks is cached from now on."""
    if not blocks:
        return
    parent = blocks[0].parent.hash if blocks[0].parent else None
    hashes = [block.hash for block in blocks]
    tokens = [token for block in blocks for token in block.tokens]
    last = events[-1] if events else None
    if isinstance(last, BlockStored) and last.block_hashes[-1] == parent:
        last.block_hashes += hashes
        last.token_ids += tokens
    else:
        events.append(BlockStored(hashes, parent, tokens, block_size))


def add_removed(events: list[KvEvent], hashes: list[int]) -> None:
    """Add the event that these blocks are not cached any more."""
    if hashes and events and isinstance(events[-1], BlockRemoved):
        events[-1].block_hashes.extend(hashes)
    elif hashes:
        events.append(BlockRemoved(hashes))
