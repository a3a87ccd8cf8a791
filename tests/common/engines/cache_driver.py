"""Drives a block cache through random requests and checks it against its memory."""

from collections import Counter
from typing import Protocol

from common.engines.block_cache import BlockCache
from common.engines.blocks import CachedSequence, CellMemory
from common.kv import KvEvent
from tests.common.engines.engine_helpers import replay

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule


class WritableMemory(CellMemory, Protocol):
    def write(self, sequence: int, start: int, tokens: list[int]) -> None:
        """Compute the KV of tokens into free cells."""

    def check(self, sequence: int, tokens: list[int]) -> None:
        """Assert that the sequence has exactly one cell for each of these tokens."""

    def used_cells(self) -> int | None:
        """The cells that any sequence holds, if the memory can tell."""


class FakeMemory:
    """Cells as llama.cpp has them: a position and the sequences that share it.

    A cell remembers all tokens up to its own, because they are what its KV depends on.
    """

    def __init__(self, cells: int) -> None:
        self.free = cells
        self.cells: list[tuple[int, tuple[int, ...], set[int]]] = []

    def share(self, source: int, target: int, start: int, end: int) -> None:
        for position, _, sequences in self.cells:
            if source in sequences and start <= position < end:
                sequences.add(target)

    def remove(self, sequence: int, start: int, end: int) -> None:
        for position, _, sequences in self.cells:
            if start <= position < end:
                sequences.discard(sequence)
        kept = [cell for cell in self.cells if cell[2]]
        self.free += len(self.cells) - len(kept)
        self.cells = kept

    def write(self, sequence: int, start: int, tokens: list[int]) -> None:
        before = self.content(sequence)
        prefix = before[start - 1] if start else ()
        for offset, token in enumerate(tokens):
            prefix = (*prefix, token)
            self.cells.append((start + offset, prefix, {sequence}))
        self.free -= len(tokens)
        assert self.free >= 0, "no free cell"

    def content(self, sequence: int) -> dict[int, tuple[int, ...]]:
        held = [cell for cell in self.cells if sequence in cell[2]]
        assert len({position for position, _, _ in held}) == len(held), "a position twice"
        return {position: prefix for position, prefix, _ in held}

    def check(self, sequence: int, tokens: list[int]) -> None:
        prefixes = {i: tuple(tokens[: i + 1]) for i in range(len(tokens))}
        assert self.content(sequence) == prefixes

    def used_cells(self) -> int | None:
        return len(self.cells)


def check_cache(cache: BlockCache, memory: WritableMemory, events: list[KvEvent], ids: int) -> None:
    """Assert that index, holders, counts, ids, cells and events tell the same story."""
    sequences = {**cache.running, **cache.finished}
    assert sorted([*sequences, *cache.free_ids]) == list(range(ids))
    for id_ in range(ids):
        memory.check(id_, sequences[id_].tokens if id_ in sequences else [])
    held: Counter[int] = Counter()
    for id_, sequence in sequences.items():
        assert sequence.id == id_
        for i, block in enumerate(sequence.blocks):
            size = cache.block_size
            assert list(block.tokens) == sequence.tokens[i * size : (i + 1) * size]
            assert block.parent is (sequence.blocks[i - 1] if i else None)
            assert cache.index[block.hash] is block
            assert id_ in block.holders
            held[block.hash] += 1
    assert held == {hash_: len(block.holders) for hash_, block in cache.index.items()}
    for block in cache.index.values():
        assert block.active == len(block.holders & set(cache.running))
    for sequence in cache.finished.values():
        assert len(sequence.blocks) * cache.block_size == len(sequence.tokens)
        assert sequence.blocks[-1].holders == {sequence.id}, "contained in another sequence"
    check_retention(cache)
    used = memory.used_cells()
    assert used is None or cache.cells - used == cache.free_cells
    active = {block for s in cache.running.values() for block in s.blocks}
    tails = sum(len(s.tokens) - len(s.blocks) * cache.block_size for s in cache.running.values())
    assert cache.available_cells == cache.cells - len(active) * cache.block_size - tails
    assert 0 <= cache.free_cells <= cache.available_cells <= cache.cells
    cache.publish()
    assert replay(events) == set(cache.index)


def check_retention(cache: BlockCache) -> None:
    """Assert that retained blocks are those of retained sequences, which are finished, and few."""
    retention = cache.retention
    retained = [s for id_, s in cache.finished.items() if id_ in retention]
    assert not any(id_ in retention for id_ in [*cache.running, *cache.free_ids])
    held = Counter(block.hash for sequence in retained for block in sequence.blocks)
    assert held == Counter({h: b.retained for h, b in cache.index.items() if b.retained})
    assert len(held) == retention.blocks <= retention.limit
    assert retention.limit * cache.block_size <= cache.cells / 2


class CacheMachine(RuleBasedStateMachine):
    """Random requests, cancellations and evictions; subclasses bring the memory."""

    cells: int
    block_size: int
    ids: int
    max_chunk: int = 1000
    memory: WritableMemory

    def make_memory(self) -> WritableMemory:
        raise NotImplementedError

    def hashes(self, tokens: list[int]) -> list[int]:
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self.memory = self.make_memory()
        self.events: list[KvEvent] = []
        self.cache = BlockCache(
            self.memory, cells=self.cells, block_size=self.block_size, max_sequences=self.ids
        )
        self.cache.subscribe(self.events.extend)
        self.now = 0.0
        self.cache.retention.clock = lambda: self.now
        self.until: dict[int, float] = {}  # of sequences that were retained, by id
        self.running: list[tuple[CachedSequence, list[int]]] = []

    @precondition(lambda self: len(self.running) < self.ids)
    @rule(data=st.data())
    def start(self, data: st.DataObject) -> None:
        """A request whose prompt may begin like an earlier one's."""
        known = [s.tokens for s in self.cache.finished.values()] + [p for _, p in self.running]
        base = data.draw(st.sampled_from([[], *known]))
        cut = data.draw(st.integers(0, len(base)))
        new = data.draw(
            st.lists(st.integers(0, 1), min_size=0 if cut else 1, max_size=3 * self.block_size)
        )
        prompt = (base[:cut] + new)[: self.cells]
        matched = self.cache.match(prompt, self.hashes(prompt))
        assert len(matched) * self.block_size < len(prompt)
        if self.cache.has_room(matched, len(prompt) - len(matched) * self.block_size):
            sequence = self.cache.start(matched)
            assert sequence.tokens == prompt[: len(matched) * self.block_size]
            assert len(prompt) - len(sequence.tokens) <= self.cache.available_cells
            self.running.append((sequence, prompt))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        """A step for one request: a chunk of its prompt, or a generated token."""
        sequence, prompt = data.draw(st.sampled_from(self.running))
        missing = prompt[len(sequence.tokens) :] or [data.draw(st.integers(0, 1))]
        chunk = missing[: data.draw(st.integers(1, min(len(missing), self.max_chunk)))]
        if self._reserve(len(chunk)):
            self.memory.write(sequence.id, len(sequence.tokens), chunk)
            self.cache.append(sequence, chunk)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def catch_up(self, data: st.DataObject) -> None:
        """Others may have computed what comes next in a prompt."""
        sequence, prompt = data.draw(st.sampled_from(self.running))
        before = len(sequence.tokens)
        if before < len(prompt):
            available = self.cache.available_cells
            reused = self.cache.catch_up(sequence, prompt, self.hashes(prompt))
            assert sequence.tokens[before:] == prompt[before : before + reused]
            assert len(sequence.tokens) < len(prompt)
            assert self.cache.available_cells >= available - reused

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.running))
        self.running.remove(request)
        sequence, prompt = request
        self.cache.finish(sequence)
        retain_s = data.draw(st.sampled_from([0.0, 0.0, 2.0, 20.0]))
        if retain_s and sequence.id in self.cache.finished:
            self.until[sequence.id] = self.now + retain_s
            self.cache.retention.add(sequence, retain_s, len(prompt) // self.block_size)

    @rule(seconds=st.floats(0.1, 10.0))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def clear(self) -> None:
        self.cache.clear()

    @rule(data=st.data())
    def reserve(self, data: st.DataObject) -> None:
        cells = data.draw(st.integers(0, self.cells))
        available = self.cache.available_cells
        assert self._reserve(cells) == (cells <= available)
        assert self.cache.free_cells >= min(cells, available) or cells > available

    def _reserve(self, cells: int) -> bool:
        """Reserve; what is retained goes only if there is not enough else."""
        kept = [
            sequence
            for id_, sequence in self.cache.finished.items()
            if id_ in self.cache.retention and self.until[id_] > self.now
        ]
        blocks = {block for sequence in kept for block in sequence.blocks}
        idle = sum(1 for block in blocks if not block.active)
        enough = cells <= self.cache.available_cells - idle * self.block_size
        reserved = self.cache.reserve(cells)
        if enough:
            assert all(self.cache.index.get(block.hash) is block for block in blocks)
            assert all(sequence.id in self.cache.retention for sequence in kept)
        return reserved

    @invariant()
    def everything_agrees(self) -> None:
        check_cache(self.cache, self.memory, self.events, self.ids)

    def teardown(self) -> None:
        for sequence, _ in self.running:
            self.cache.finish(sequence)
        self.cache.clear()
        check_cache(self.cache, self.memory, self.events, self.ids)
        assert self.cache.free_cells == self.cells
        assert not self.cache.index
