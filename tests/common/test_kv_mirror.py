import time
from collections.abc import Callable

from common.kv import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent, block_hashes
from common.kv_mirror import KvMirror
from tests.common.engines.engine_helpers import replay

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

SIZE = 2
sequences = st.lists(st.integers(0, 1), min_size=SIZE, max_size=6 * SIZE)


def stored(tokens: list[int], first: int = 0) -> BlockStored:
    """The event for the blocks of a sequence from number `first` on."""
    hashes = block_hashes(tokens, SIZE)
    return BlockStored(
        hashes[first:],
        hashes[first - 1] if first else None,
        tokens[first * SIZE : len(hashes) * SIZE],
        SIZE,
    )


@st.composite
def histories(draw: st.DrawFn) -> list[KvEvent]:
    """Sequences are stored in one or two events; blocks go in any order, parents too."""
    events: list[KvEvent] = []
    known: set[int] = set()
    for tokens in draw(st.lists(sequences, max_size=12)):
        hashes = block_hashes(tokens, SIZE)
        known.update(hashes)
        cut = draw(st.integers(0, len(hashes) - 1))
        events += [stored(tokens[: cut * SIZE])] if cut else []
        events.append(stored(tokens, cut))
        gone = draw(st.lists(st.sampled_from(sorted(known)), max_size=4, unique=True))
        events += [BlockRemoved(gone)] if gone else []
        if draw(st.integers(0, 19)) == 0:
            events.append(AllBlocksCleared())
    return events


def mirror_of(events: list[KvEvent]) -> KvMirror:
    mirror = KvMirror()
    mirror.apply(events)
    return mirror


def reachable(mirror: KvMirror) -> dict[int, tuple[int | None, tuple[int, ...]]]:
    """The blocks whose ancestors are all there."""

    def is_whole(block: int | None) -> bool:
        return block is None or (block in mirror.blocks and is_whole(mirror.blocks[block][0]))

    return {block: content for block, content in mirror.blocks.items() if is_whole(block)}


@given(histories())
@settings(max_examples=200, deadline=None, database=None)
def test_the_events_rebuild_the_same_content(history: list[KvEvent]) -> None:
    mirror = mirror_of(history)
    events = mirror.events()
    assert replay(events) == set(reachable(mirror))  # parents first, no block twice
    assert mirror_of([*events]).blocks == reachable(mirror)


def test_a_chain_is_one_event_and_a_fork_begins_new_ones() -> None:
    a, b, c, d = [1, 1], [2, 2], [3, 3], [4, 4]
    mirror = mirror_of([stored([*a, *b]), stored([*a, *b, *c], 2), stored([*a, *b, *d], 2)])
    events = mirror.events()
    assert events == [stored([*a, *b]), stored([*a, *b, *c], 2), stored([*a, *b, *d], 2)]
    assert mirror_of([stored([*a, *b]), stored([*a, *b, *c], 2)]).events() == [stored([*a, *b, *c])]


def test_blocks_without_their_parent_are_left_out_until_it_comes_back() -> None:
    tokens = [1, 1, 2, 2, 3, 3]
    a, b, c = block_hashes(tokens, SIZE)
    mirror = mirror_of([stored(tokens), BlockRemoved([b])])
    assert mirror.events() == [stored(tokens[:2])]
    mirror.apply([stored(tokens[:4], 1)])
    assert mirror.events() == [stored(tokens)]
    assert set(mirror.blocks) == {a, b, c}


def test_a_block_that_is_its_own_ancestor_is_left_out() -> None:
    """No engine should say so, but a snapshot must end whatever they say."""
    mirror = mirror_of([BlockStored([1, 2, 1], None, [0] * 6, 2), BlockStored([5], 5, [0, 0], 2)])
    assert mirror.events() == []


def test_an_empty_cache_has_no_events() -> None:
    assert KvMirror().events() == []
    assert mirror_of([stored([1, 1]), AllBlocksCleared()]).events() == []
    assert mirror_of([BlockRemoved([4])]).events() == []


def chain(blocks: int) -> list[KvEvent]:
    return [BlockStored([i], i - 1 if i else None, [i] * 4, 4) for i in range(blocks)]


def one_event(blocks: int) -> list[KvEvent]:
    return [BlockStored(list(range(blocks)), None, [7] * 4 * blocks, 4)]


def wide(blocks: int) -> list[KvEvent]:
    return [BlockStored([i], 0 if i else None, [i] * 4, 4) for i in range(blocks)]


def comb(blocks: int) -> list[KvEvent]:
    """A chain, each block of which has another child that is a leaf."""
    return [BlockStored([i], (i - 1) // 2 * 2 if i else None, [i] * 4, 4) for i in range(blocks)]


@pytest.mark.parametrize("shape", [chain, one_event, wide, comb])
def test_a_large_cache_is_rebuilt_fast(shape: Callable[[int], list[KvEvent]]) -> None:
    """Snapshots are made on the engine's event loop, while requests wait.

    It takes 0.3 s on a slow machine; what copies a list per block takes a minute.
    """
    events = shape(100_000)
    start = time.process_time()
    rebuilt = mirror_of(events).events()
    assert time.process_time() - start < 5
    assert sum(len(event.block_hashes) for event in rebuilt) == 100_000
