"""What the block cache is made of: blocks, the sequences that hold them, and the cells behind."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol


class CellMemory(Protocol):
    """The memory whose cells the cache accounts for; positions are in tokens, `end` exclusive."""

    def share(self, source: int, target: int, start: int, end: int) -> None:
        """Let sequence `target` hold the cells that `source` holds at these positions."""

    def remove(self, sequence: int, start: int, end: int) -> None:
        """Let go of cells; one that no sequence holds is free."""


@dataclass(eq=False, slots=True)
class Block:
    """`block_size` tokens that follow those of `parent`.

    `holders` are the ids of the sequences that share it; `active` counts the running ones,
    `retained` those that are kept for a next request.
    """

    hash: int
    parent: "Block | None"
    tokens: tuple[int, ...]
    holders: set[int] = field(default_factory=set)
    active: int = 0
    retained: int = 0


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
