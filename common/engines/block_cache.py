"""The block prefix cache: which KV cells hold which tokens, and which sequences share them.

Pure bookkeeping. A *sequence* is a run of tokens with a small id, as in llama.cpp; its full
blocks are shared with every sequence that has the same prefix, its partial last block (the
*tail*) is its own. The blocks form a tree: a sequence that holds a block holds all of its
ancestors. A finished sequence stays as the holder of blocks that nothing else holds, and is
forgotten from its last block backwards, the least recently used first; one that is retained
for its next request only when no other is left, see `retention`.
"""

from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Tokens

from common.engines.blocks import Block, CachedSequence, CellMemory, is_same
from common.engines.cache_events import add_removed, add_stored
from common.engines.retention import SHARE, Retention
from common.kv import AllBlocksCleared, KvEvent, block_hash


class BlockCache:
    """Shares, evicts and accounts for the cells of one memory; not thread-safe."""

    def __init__(
        self, memory: CellMemory, *, cells: int, block_size: int, max_sequences: int
    ) -> None:
        self.cells = cells
        self.block_size = block_size
        self.index: dict[int, Block] = {}
        self.running: dict[int, CachedSequence] = {}
        self.finished: OrderedDict[int, CachedSequence] = OrderedDict()  # least recent first
        self.free_ids = list(range(max_sequences - 1, -1, -1))
        self.retention = Retention(int(SHARE * cells) // block_size)
        self._memory = memory
        self._tail_cells = 0
        self._active_blocks = 0
        self._events: list[KvEvent] = []
        self._subscribers: list[Callable[[list[KvEvent]], None]] = []

    @property
    def free_cells(self) -> int:
        return self.cells - len(self.index) * self.block_size - self._tail_cells

    @property
    def available_cells(self) -> int:
        """Cells that are free or can be freed by eviction."""
        return self.cells - self._active_blocks * self.block_size - self._tail_cells

    @property
    def active_blocks(self) -> int:
        """Blocks that running sequences hold, counting the cells of their tails."""
        return self._active_blocks + -(-self._tail_cells // self.block_size)

    def match(self, tokens: Tokens[int], hashes: Tokens[int]) -> list[Block]:
        """The cached blocks that `tokens` starts with, given their chained `hashes`.

        At least one token is left over, because only computing a token gives its logits.
        """
        found: list[Block] = []
        size = self.block_size
        for i in range(min(len(hashes), (len(tokens) - 1) // size)):
            block = self.index.get(hashes[i])
            parent = found[-1] if found else None
            if block is None or not is_same(block, parent, tokens[i * size : (i + 1) * size]):
                break
            found.append(block)
        return found

    def has_room(self, matched: list[Block], new_tokens: int) -> bool:
        """Whether a sequence on top of `matched` could get cells for `new_tokens` more."""
        idle = sum(1 for block in matched if not block.active)
        return new_tokens <= self.available_cells - idle * self.block_size

    def start(self, matched: list[Block]) -> CachedSequence:
        """A running sequence that shares the matched blocks.

        Raises:
            RuntimeError: every sequence id is taken by a running sequence.
        """
        source = next(iter(matched[-1].holders)) if matched else None
        if not self.free_ids:
            victim = self.retention.victim(self.finished, source)
            if victim is not None:
                self._forget(victim)
            elif source is not None and source in self.finished:
                return self._resume(self.finished[source], matched)
            else:
                raise RuntimeError("more running sequences than sequence ids")
        sequence = CachedSequence(self.free_ids.pop())
        self.running[sequence.id] = sequence
        self._share(sequence, matched)
        return sequence

    def catch_up(self, sequence: CachedSequence, tokens: Tokens[int], hashes: Tokens[int]) -> int:
        """Share the blocks of `tokens` that others have computed since the sequence started.

        Returns how many tokens need not be computed any more.
        """
        if sequence.sealed or self._tail(sequence):
            return 0
        found = self.match(tokens, hashes)[len(sequence.blocks) :]
        self._share(sequence, found)
        return len(found) * self.block_size

    def reserve(self, cells: int) -> bool:
        """Evict until that many cells are free; False, evicting nothing, if they cannot be."""
        if cells > self.available_cells:
            return False
        while self.free_cells < cells:
            victim = self.retention.victim(self.finished)
            assert victim is not None  # noqa: S101 (only finished sequences hold what is available)
            self._drop_blocks(victim, len(victim.blocks) - 1)
            self._forget_if_contained(victim)
        return True

    def append(self, sequence: CachedSequence, tokens: Tokens[int]) -> None:
        """Record that the KV of `tokens`, which follow the sequence's, is now in memory."""
        sequence.tokens.extend(tokens)
        self._tail_cells += len(tokens)
        stored: list[Block] = []
        while not sequence.sealed and self._tail(sequence) >= self.block_size:
            start = len(sequence.blocks) * self.block_size
            content = tuple(sequence.tokens[start : start + self.block_size])
            parent = sequence.blocks[-1] if sequence.blocks else None
            hash_ = block_hash(parent.hash if parent else None, content)
            block = self.index.get(hash_)
            if block is None:
                block = self.index[hash_] = Block(hash_, parent, content)
                stored.append(block)
            elif is_same(block, parent, content):
                # Another sequence computed it meanwhile: share its cells and free ours.
                self._memory.remove(sequence.id, start, start + self.block_size)
                holder = next(iter(block.holders))
                self._memory.share(holder, sequence.id, start, start + self.block_size)
                add_stored(self._events, stored, self.block_size)
                stored = []
            else:
                sequence.sealed = True
                break
            self._tail_cells -= self.block_size
            self._hold(sequence, block)
            if len(block.holders) == 2:
                self._forget_contained_holder(block, sequence)
        add_stored(self._events, stored, self.block_size)

    def finish(self, sequence: CachedSequence) -> None:
        """Stop running: free the tail and keep the full blocks for others, until evicted."""
        tail = self._tail(sequence)
        if tail:
            start = len(sequence.tokens) - tail
            self._memory.remove(sequence.id, start, len(sequence.tokens))
            del sequence.tokens[start:]
            self._tail_cells -= tail
        del self.running[sequence.id]
        for block in sequence.blocks:
            self._deactivate(block)
        self.finished[sequence.id] = sequence
        self._forget_if_contained(sequence)

    def clear(self) -> None:
        """Forget every finished sequence."""
        removed_from = len(self._events)
        while self.finished:
            self._forget(next(iter(self.finished.values())))
        if not self.index and len(self._events) > removed_from:
            self._events[removed_from:] = [AllBlocksCleared()]

    def subscribe(self, callback: Callable[[list[KvEvent]], None]) -> None:
        """Have every batch of events handed to `callback`, which must not block."""
        self._subscribers.append(callback)

    def publish(self) -> None:
        """Hand out what has happened since the last call, in order."""
        events, self._events = self._events, []
        if events:
            for callback in self._subscribers:
                callback(events)

    def _tail(self, sequence: CachedSequence) -> int:
        return len(sequence.tokens) - len(sequence.blocks) * self.block_size

    def _share(self, sequence: CachedSequence, blocks: list[Block]) -> None:
        """Let the sequence hold blocks that follow its own."""
        if not blocks:
            return
        start = len(sequence.tokens)
        source = next(iter(blocks[-1].holders))
        self._memory.share(source, sequence.id, start, start + len(blocks) * self.block_size)
        for block in blocks:
            self._hold(sequence, block)
            sequence.tokens.extend(block.tokens)
        self.retention.taken_up(blocks[-1].holders, len(sequence.blocks))
        if source in self.finished:
            self._forget_if_contained(self.finished[source])

    def _hold(self, sequence: CachedSequence, block: Block) -> None:
        block.holders.add(sequence.id)
        sequence.blocks.append(block)
        self._activate(block)

    def _activate(self, block: Block) -> None:
        block.active += 1
        self._active_blocks += block.active == 1

    def _deactivate(self, block: Block) -> None:
        block.active -= 1
        self._active_blocks -= block.active == 0

    def _resume(self, sequence: CachedSequence, matched: list[Block]) -> CachedSequence:
        """Run on in a finished sequence, cut to the matched blocks: for when ids run out."""
        self.retention.end(sequence.id)
        self._drop_blocks(sequence, len(matched))
        self.running[sequence.id] = self.finished.pop(sequence.id)
        for block in matched:
            self._activate(block)
        return sequence

    def _forget_if_contained(self, sequence: CachedSequence) -> None:
        """A finished sequence whose last block another one holds, too, is of no use."""
        if not sequence.blocks or len(sequence.blocks[-1].holders) > 1:
            self._forget(sequence)

    def _forget_contained_holder(self, block: Block, by: CachedSequence) -> None:
        other = next(id_ for id_ in block.holders if id_ != by.id)
        finished = self.finished.get(other)
        if finished is not None and finished.blocks[-1] is block:
            self._forget(finished)

    def _forget(self, sequence: CachedSequence) -> None:
        self.retention.end(sequence.id)
        self._drop_blocks(sequence, 0)
        del self.finished[sequence.id]
        self.free_ids.append(sequence.id)

    def _drop_blocks(self, sequence: CachedSequence, keep: int) -> None:
        """Let go of a finished sequence's blocks from the end, leaving `keep`."""
        if keep == len(sequence.blocks):
            return
        self._memory.remove(sequence.id, keep * self.block_size, len(sequence.tokens))
        removed: list[int] = []
        for block in reversed(sequence.blocks[keep:]):
            block.holders.remove(sequence.id)
            if not block.holders:
                del self.index[block.hash]
                removed.append(block.hash)
        del sequence.blocks[keep:]
        del sequence.tokens[keep * self.block_size :]
        add_removed(self._events, removed)
