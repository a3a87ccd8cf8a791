"""What the block cache is made of: blocks, the sequences that hold them, and the cells behind."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from common.kv import BlockStored, KvEvent


class CellMemory(Protocol):
    """The memory whose cells the cache accounts for; positions are in tokens, `end` exclusive."""

    def share(self, source: int, target: int, start: int, end: int) -> None:
        """Let sequence `target` hold the cells that `source` holds at these positions."""

    def remove(self, sequence: int, start: int, end: int) -> None:
        """Let go of cells; one that no sequence holds is free."""


@dataclass(eq=False, slots=True)
class Block:
    """`block_size` tokens that follow those of `parent`.

    `holders` are the ids of the sequences that share it; `active` counts the running ones.
    """

    hash: int
    parent: "Block | None"
    tokens: tuple[int, ...]
    holders: set[int] = field(default_factory=set)
    active: int = 0


@dataclass(eq=False, slots=True)
class CachedSequence:
    """A sequence's tokens whose KV is in memory, and its full blocks.

    `sealed`: a block's hash collided with another block's, so the rest stays out of the index.
    """

    id: int
    tokens: list[int] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    sealed: bool = False


def is_same(block: Block, parent: Block | None, tokens: Sequence[int]) -> bool:
    """Equal hashes are not proof: the content decides, so a collision cannot corrupt."""
    return block.parent is parent and block.tokens == tuple(tokens)


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
