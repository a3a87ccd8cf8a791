"""What the router holds after a week of engines that cache, evict, come and go."""

import random
from array import array
from collections import deque
from dataclasses import dataclass, field

from chapter2.selector import Selector
from common.kv import AllBlocksCleared, BlockRemoved, BlockStored
from tests.chapter2.fleet import MODEL, Clock, add_engine, load, source

import psutil
import pytest

BLOCK_SIZE = 16
ENGINES = 8
HOURS = 7 * 24
SEQUENCES_AN_HOUR = 32  # on each engine
PREFIX_BLOCKS, OWN_BLOCKS = 16, 48
KEPT_SEQUENCES = 8  # on each engine
PROMPT_BLOCKS = 8  # that a prompt adds to what is cached
STORED_BLOCKS = HOURS * ENGINES * SEQUENCES_AN_HOUR * OWN_BLOCKS  # and the prefixes
GROWTH_MB = 8  # an index that kept all of these would need about 500


def new_tokens(rng: random.Random, blocks: int) -> list[int]:
    return array("H", rng.randbytes(2 * blocks * BLOCK_SIZE)).tolist()


@dataclass
class ChurningEngine:
    """Caches one sequence after the other, each after one of the system prompts."""

    selector: Selector
    instance: int
    rng: random.Random
    prefixes: list[list[int]]
    prefix_hashes: dict[int, list[int]] = field(default_factory=dict)
    sequences: deque[list[int]] = field(default_factory=deque)

    @property
    def blocks(self) -> int:
        return PREFIX_BLOCKS * len(self.prefix_hashes) + OWN_BLOCKS * len(self.sequences)

    def cache_one(self) -> list[int]:
        """Store a sequence and evict the oldest; the tokens of what was stored."""
        chosen = self.rng.randrange(len(self.prefixes))
        prefix = self.prefixes[chosen]
        if chosen not in self.prefix_hashes:
            self.prefix_hashes[chosen] = self.hashes(PREFIX_BLOCKS)
            stored = BlockStored(self.prefix_hashes[chosen], None, prefix, BLOCK_SIZE)
            self.selector.index.apply(self.instance, [stored])
        tokens, hashes = new_tokens(self.rng, OWN_BLOCKS), self.hashes(OWN_BLOCKS)
        parent = self.prefix_hashes[chosen][-1]
        self.selector.index.apply(self.instance, [BlockStored(hashes, parent, tokens, BLOCK_SIZE)])
        self.sequences.append(hashes)
        if len(self.sequences) > KEPT_SEQUENCES:
            removed = BlockRemoved(self.sequences.popleft()[::-1])
            self.selector.index.apply(self.instance, [removed])
        return prefix + tokens

    def clear(self) -> None:
        self.selector.index.apply(self.instance, [AllBlocksCleared()])
        self.prefix_hashes.clear()
        self.sequences.clear()

    def hashes(self, count: int) -> list[int]:
        return [self.rng.getrandbits(63) for _ in range(count)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("chapter2.selector.time", clock)
    monkeypatch.setattr("chapter2.workers.time", clock)
    return clock


def test_a_week_of_churn_leaves_nothing_behind(clock: Clock) -> None:
    """Two million blocks pass, some thousands are cached at a time; every 4 hours an engine
    leaves, by discovery or by failing first, and another one joins under a new id."""
    assert STORED_BLOCKS > 2_000_000
    rng = random.Random(1)
    prefixes = [new_tokens(rng, PREFIX_BLOCKS) for _ in range(6)]
    selector = Selector("kv", seed=1)
    engines: deque[ChurningEngine] = deque()
    rss_after_a_day = 0

    def join() -> None:
        instance = rng.getrandbits(64)
        add_engine(selector, instance, clock, source(block_size=BLOCK_SIZE))
        engines.append(ChurningEngine(selector, instance, rng, prefixes))

    for _ in range(ENGINES):
        join()
    for hour in range(HOURS):
        clock.now = 3600.0 * (hour + 1)
        for _ in range(SEQUENCES_AN_HOUR):
            clock.now += 1.0
            prompt: list[int] = []
            for engine in engines:
                prompt = engine.cache_one()
                selector.workers[engine.instance].hear(load(running=1))
            prompt += new_tokens(rng, PROMPT_BLOCKS)
            assert selector.select(prompt, MODEL).overlap_blocks > 0
        if hour % 4 == 3:
            leaving = engines.popleft()
            if hour % 8 == 3:
                selector.fail(leaving.instance)
            selector.remove(leaving.instance)
            join()
        if hour % 10 == 9:
            engines[-2].clear()
        if hour == 24:
            rss_after_a_day = psutil.Process().memory_info().rss

    assert psutil.Process().memory_info().rss - rss_after_a_day < GROWTH_MB * 2**20
    assert set(selector.workers) == {engine.instance for engine in engines}
    index = selector.index
    held = {engine.instance: engine.blocks for engine in engines if engine.blocks}
    assert sum(held.values()) > 2_000
    assert {i: index.block_count(i) for i in held} == held
    assert sum(len(names) for names in index._names.values()) == sum(held.values())
    in_tree = sum(e.count('"block_hash"') for e in index._tree.dump_tree_as_events())
    assert in_tree == sum(held.values())
    for worker in selector.workers.values():  # a prompt a second counts as cached for 10
        assert len(worker._prefixes) <= 11 * PROMPT_BLOCKS
        assert len(worker._expected) <= 11
        assert len(worker._routed) <= 11
