"""The content of a block cache, rebuilt from its events."""

from collections.abc import Iterable

from common.kv import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent

Cached = tuple[int | None, tuple[int, ...]]  # a block's parent and its tokens


class KvMirror:
    """Which blocks an engine has cached, by their hashes."""

    def __init__(self) -> None:
        self.blocks: dict[int, Cached] = {}

    def apply(self, events: Iterable[KvEvent]) -> None:
        for event in events:
            if isinstance(event, AllBlocksCleared):
                self.blocks.clear()
            elif isinstance(event, BlockRemoved):
                for block in event.block_hashes:
                    self.blocks.pop(block, None)
            else:
                parent, size = event.parent_block_hash, event.block_size
                for i, block in enumerate(event.block_hashes):
                    self.blocks[block] = parent, tuple(event.token_ids[i * size : (i + 1) * size])
                    parent = block

    def events(self) -> list[BlockStored]:
        """The events that build the same content from nothing, parents before children.

        A block whose parent is not cached any more cannot be part of a prefix and is left out.
        """
        children: dict[int | None, list[int]] = {}
        for block, (parent, _) in self.blocks.items():
            children.setdefault(parent, []).append(block)
        events: list[BlockStored] = []
        branches: list[int] = list(reversed(children.get(None, [])))
        while branches:
            block = branches.pop()
            parent, tokens = self.blocks[block]
            event = BlockStored([block], parent, list(tokens), len(tokens))
            while len(following := children.get(event.block_hashes[-1], [])) == 1:
                event.block_hashes += following
                event.token_ids += self.blocks[following[0]][1]
            branches += reversed(following)
            events.append(event)
        return events
