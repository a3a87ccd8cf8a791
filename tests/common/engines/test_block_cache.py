from collections.abc import Sequence
from unittest.mock import patch

from common.engines.block_cache import BlockCache
from common.kv import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KvEvent,
    block_hash,
    block_hashes,
)
from tests.common.engines.cache_driver import CacheMachine, FakeMemory, check_cache

import pytest
from hypothesis import settings


class AgainstFakeMemory(CacheMachine):
    """Few cells and few ids, so that both run out all the time."""

    cells, block_size, ids = 40, 4, 4

    def make_memory(self) -> FakeMemory:
        return FakeMemory(self.cells)

    def hashes(self, tokens: list[int]) -> list[int]:
        return block_hashes(tokens, self.block_size)


def _colliding(parent: int | None, token_ids: Sequence[int]) -> int:
    return block_hash(parent, token_ids) % 5


class WithCollidingHashes(AgainstFakeMemory):
    """A hash says little here: only the tokens decide what is shared."""

    def __init__(self) -> None:
        self._patch = patch("common.engines.block_cache.block_hash", _colliding)
        self._patch.start()
        super().__init__()

    def hashes(self, tokens: list[int]) -> list[int]:
        found: list[int] = []
        for start in range(0, len(tokens) - self.block_size + 1, self.block_size):
            parent = found[-1] if found else None
            found.append(_colliding(parent, tokens[start : start + self.block_size]))
        return found

    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            self._patch.stop()


class WithOneBlockTokens(AgainstFakeMemory):
    """Blocks of one token: every token is shared."""

    cells, block_size, ids = 12, 1, 3


for machine in (AgainstFakeMemory, WithCollidingHashes, WithOneBlockTokens):
    machine.TestCase.settings = settings(
        max_examples=120, stateful_step_count=40, deadline=None, database=None
    )
TestAgainstFakeMemory = AgainstFakeMemory.TestCase
TestWithCollidingHashes = WithCollidingHashes.TestCase
TestWithOneBlockTokens = WithOneBlockTokens.TestCase


class Cache:
    """A block cache over a fake memory, with its events."""

    def __init__(self, cells: int = 64, ids: int = 4) -> None:
        self.memory = FakeMemory(cells)
        self.cache = BlockCache(self.memory, cells=cells, block_size=4, max_sequences=ids)
        self.events: list[KvEvent] = []
        self.cache.subscribe(self.events.extend)
        self.ids = ids

    def run(self, tokens: list[int], *, finish: bool = True) -> int:
        """Compute a whole request; how many of its tokens were cached."""
        matched = self.cache.match(tokens, block_hashes(tokens, 4))
        sequence = self.cache.start(matched)
        cached = len(sequence.tokens)
        assert self.cache.reserve(len(tokens) - cached)
        self.memory.write(sequence.id, cached, tokens[cached:])
        self.cache.append(sequence, tokens[cached:])
        if finish:
            self.cache.finish(sequence)
        self.cache.publish()
        check_cache(self.cache, self.memory, self.events, self.ids)
        return cached


A, B, C = [1] * 4, [2] * 4, [3] * 4


def test_a_finished_prefix_is_reused_but_one_token_is_left_to_compute() -> None:
    cache = Cache()
    assert cache.run([*A, *B, 9]) == 0
    assert cache.run([*A, *B, 8]) == 8
    assert cache.run([*A, *B]) == 4
    assert cache.run([*B, *A]) == 0


def test_a_longer_sequence_takes_the_place_of_the_one_it_contains() -> None:
    """Turns of a chat: each holds one sequence id, not one a turn."""
    cache = Cache()
    for turns in range(1, 5):
        cache.run([*A, *B, *C, *A][: 4 * turns])
        assert len(cache.cache.finished) == 1


def test_the_least_recently_used_sequence_goes_first_from_its_end() -> None:
    cache = Cache(cells=32)
    cache.run([*A, *B, *C])
    cache.run([*C, *C, *C])
    cache.events.clear()
    assert cache.cache.reserve(16)
    cache.cache.publish()
    assert cache.events == [BlockRemoved([block_hashes([*A, *B, *C], 4)[i] for i in (2, 1)])]
    cache.events.insert(0, _stored([*A, *B, *C]))
    cache.events.insert(1, _stored([*C, *C, *C]))
    assert cache.run([*A, 5]) == 4
    assert cache.run([*C, *C, *C, 5]) == 12


def test_when_ids_run_out_a_request_runs_on_in_the_sequence_it_matches() -> None:
    cache = Cache(ids=1)
    cache.run([*A, *B, *C])
    assert cache.run([*A, *B, 7, 7]) == 8


def test_more_running_sequences_than_ids_is_an_error() -> None:
    cache = Cache(ids=1)
    cache.run([*A], finish=False)
    with pytest.raises(RuntimeError, match="sequence ids"):
        cache.cache.start([])


def test_two_requests_that_compute_the_same_block_end_up_sharing_it() -> None:
    cache = Cache()
    first, second = cache.cache.start([]), cache.cache.start([])
    for sequence in (first, second):
        cache.memory.write(sequence.id, 0, [*A, 5])
        cache.cache.append(sequence, [*A, 5])
    cache.cache.publish()
    assert len(cache.memory.cells) == 6
    assert cache.events == [_stored(A)]
    check_cache(cache.cache, cache.memory, cache.events, cache.ids)


def test_a_finished_sequence_goes_when_a_running_one_has_computed_the_same() -> None:
    cache = Cache()
    running = cache.cache.start([])
    cache.run([*A, *B, 1])
    cache.memory.write(running.id, 0, [*A, *B])
    cache.cache.append(running, [*A, *B])
    assert not cache.cache.finished
    check_cache(cache.cache, cache.memory, cache.events, cache.ids)


def test_matched_blocks_are_no_room_for_the_rest_of_the_request() -> None:
    """They can be evicted now, but not once the request has started on them."""
    cache = Cache(cells=16)
    cache.run([*A, *B, 1])
    cache.run([*C], finish=False)
    tokens = [*A, *B, *[5] * 5]
    matched = cache.cache.match(tokens, block_hashes(tokens, 4))
    assert cache.cache.available_cells == 12
    assert cache.cache.has_room(matched, 4)
    assert not cache.cache.has_room(matched, 5)


def test_clearing_an_idle_cache_is_one_event() -> None:
    cache = Cache()
    cache.run([*A, *B, 1])
    cache.run([*B, 1])
    cache.events.clear()
    cache.cache.clear()
    cache.cache.publish()
    assert cache.events == [AllBlocksCleared()]
    assert cache.memory.free == 64


def test_a_stored_event_names_its_parent() -> None:
    cache = Cache()
    cache.run([*A, 1])
    cache.run([*A, *B, *C, 1])
    a, b, c = block_hashes([*A, *B, *C], 4)
    assert cache.events == [_stored(A), BlockStored([b, c], a, [*B, *C], 4)]


def _stored(tokens: list[int]) -> BlockStored:
    return BlockStored(block_hashes(tokens, 4), None, tokens, 4)
