"""The router's picture of the engines' caches against the caches themselves."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from chapter2.index import KvIndex, UnknownBlockError, prefix_names
from common.engines.block_cache import BlockCache
from common.engines.blocks import CachedSequence
from common.engines.simulated import SimulatedEngine, SimulatedSettings
from common.kv import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KvEvent,
    KvEventBatch,
    block_hash,
    block_hashes,
)
from common.kv_mirror import KvMirror
from tests.chapter2.fleet import stored
from tests.common.engines.engine_helpers import collect, replay

import msgspec
import psutil
import pytest
from dynamo.llm import compute_block_hash_for_seq
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

A, B, C = [1] * 4, [2] * 4, [3] * 4
FIRST, SECOND = 2**63 + 11, 12  # instance ids are unsigned 64-bit integers

encode = msgspec.msgpack.encode
decode_batch = msgspec.msgpack.Decoder(KvEventBatch).decode
decode_snapshot = msgspec.msgpack.Decoder(list[BlockStored]).decode


def overlaps(index: KvIndex, tokens: list[int], block_size: int = 4) -> dict[int, int]:
    return index.overlaps(compute_block_hash_for_seq(tokens, block_size))


class _NoMemory:
    def share(self, source: int, target: int, start: int, end: int) -> None: ...

    def remove(self, sequence: int, start: int, end: int) -> None: ...


Translate = Callable[[int], int]


@dataclass
class Engine:
    """A real block cache, whose events go over the wire with another engine's block hashes."""

    instance: int
    block_size: int
    translate: Translate
    cells: int = 24
    ids: int = 4
    running: list[tuple[CachedSequence, list[int]]] = field(default_factory=list)
    outbox: list[tuple[int, bytes]] = field(default_factory=list)
    sent: int = -1
    received: int = -1

    def __post_init__(self) -> None:
        self.mirror = KvMirror()
        self.cache = BlockCache(
            _NoMemory(), cells=self.cells, block_size=self.block_size, max_sequences=self.ids
        )
        self.cache.subscribe(self.send)

    def send(self, events: list[KvEvent]) -> None:
        self.sent += 1
        own = [self._with_own_hashes(event) for event in events]
        self.mirror.apply(own)
        self.outbox.append((self.sent, encode(KvEventBatch(0.0, own))))

    def snapshot(self) -> list[BlockStored]:
        return decode_snapshot(encode(self.mirror.events()))

    def blocks(self) -> set[int]:
        return {self.translate(hash_) for hash_ in self.cache.index}

    def longest_prefix(self, tokens: list[int]) -> int:
        """How many of the first blocks of `tokens` are in the cache."""
        hashes = block_hashes(tokens, self.block_size)
        missing = (i for i, hash_ in enumerate(hashes) if hash_ not in self.cache.index)
        return next(missing, len(hashes))

    def _with_own_hashes(self, event: KvEvent) -> KvEvent:
        if isinstance(event, AllBlocksCleared):
            return event
        hashes = [self.translate(hash_) for hash_ in event.block_hashes]
        if isinstance(event, BlockRemoved):
            return BlockRemoved(hashes)
        parent = event.parent_block_hash
        return BlockStored(
            hashes,
            None if parent is None else self.translate(parent),
            event.token_ids,
            event.block_size,
        )


def unsigned(hash_: int) -> int:
    """As vLLM has them."""
    return hash_ & (2**64 - 1)


class Fleet(RuleBasedStateMachine):
    """Random requests, evictions and losses; the router follows by what arrives on the wire."""

    lossy = False

    def __init__(self) -> None:
        super().__init__()
        self.index = KvIndex()
        self.engines = [
            Engine(FIRST, 2, lambda hash_: hash_),
            Engine(SECOND, 2, lambda hash_: ~hash_),
            Engine(13, 3, unsigned),
        ]
        self.prompts: list[list[int]] = [[], [0], [0, 0], [1, 0, 1, 0, 1, 0, 1]]

    def pick(self, data: st.DataObject) -> Engine:
        return data.draw(st.sampled_from(self.engines))

    @rule(data=st.data())
    def start(self, data: st.DataObject) -> None:
        """A request that may begin like an earlier one of any engine."""
        engine = self.pick(data)
        base = data.draw(st.sampled_from(self.prompts))
        new = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=9))
        prompt = (base[: data.draw(st.integers(0, len(base)))] + new)[: engine.cells]
        self.prompts = [*self.prompts[-11:], prompt]
        cache = engine.cache
        matched = cache.match(prompt, block_hashes(prompt, engine.block_size))
        room = cache.has_room(matched, len(prompt) - len(matched) * engine.block_size)
        if room and len(engine.running) < engine.ids:
            engine.running.append((cache.start(matched), prompt))
            self.compute(engine, len(prompt), 0)

    @rule(data=st.data(), token=st.integers(0, 1), chunk=st.integers(1, 4))
    def step(self, data: st.DataObject, token: int, chunk: int) -> None:
        self.compute(self.pick(data), chunk, token)

    def compute(self, engine: Engine, chunk: int, token: int) -> None:
        for sequence, prompt in engine.running[-1:]:
            tokens = prompt[len(sequence.tokens) :][:chunk] or [token]
            if engine.cache.reserve(len(tokens)):
                engine.cache.append(sequence, tokens)

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        """A request finishes, or is cancelled in the middle of its prompt."""
        engine = self.pick(data)
        if engine.running:
            request = data.draw(st.sampled_from(engine.running))
            engine.running.remove(request)
            engine.cache.finish(request[0])

    @rule(data=st.data(), cells=st.integers(1, 24))
    def evict(self, data: st.DataObject, cells: int) -> None:
        self.pick(data).cache.reserve(cells)

    @rule(data=st.data())
    def clear(self, data: st.DataObject) -> None:
        self.pick(data).cache.clear()

    @rule(data=st.data())
    def leave_and_come_back(self, data: st.DataObject) -> None:
        """A failed request makes the router forget an engine until it has a snapshot."""
        engine = self.pick(data)
        self.publish(engine)
        self.index.remove(engine.instance)
        assert self.index.block_count(engine.instance) == 0
        assert all(engine.instance not in self.found(engine, prompt) for prompt in self.prompts)
        self.heal(engine)

    @precondition(lambda self: self.lossy)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        engine = self.pick(data)
        engine.cache.publish()
        engine.outbox.clear()

    @precondition(lambda self: self.lossy)
    @rule(data=st.data())
    def send_sign_of_life(self, data: st.DataObject) -> None:
        engine = self.pick(data)
        engine.cache.publish()
        engine.send([])

    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        self.publish(self.pick(data))

    def publish(self, engine: Engine) -> None:
        engine.cache.publish()
        batches, engine.outbox = engine.outbox, []
        for number, payload in batches:
            if number != engine.received + 1:
                assert self.lossy
                self.heal(engine)
                return
            engine.received = number
            self.index.apply(engine.instance, decode_batch(payload).events)

    def heal(self, engine: Engine) -> None:
        self.index.remove(engine.instance)
        self.index.apply(engine.instance, engine.snapshot())
        engine.received = engine.sent

    def found(self, engine: Engine, prompt: list[int]) -> dict[int, int]:
        return overlaps(self.index, prompt, engine.block_size)

    @invariant()
    def who_has_received_everything_agrees(self) -> None:
        for engine in self.engines:
            if not self.lossy:
                self.publish(engine)
            engine.cache.publish()
            if engine.received == engine.sent:
                self.agrees(engine)

    def agrees(self, engine: Engine) -> None:
        blocks = self.index.blocks().get(engine.instance, [])
        assert set(blocks) == engine.blocks()
        assert self.index.block_count(engine.instance) == len(blocks) == len(engine.cache.index)
        for prompt in self.prompts:
            found = self.found(engine, prompt).get(engine.instance, 0)
            assert found == engine.longest_prefix(prompt)

    def teardown(self) -> None:
        """After the next sign of life, everything agrees, whatever was lost."""
        for engine in self.engines:
            engine.cache.publish()
            engine.send([])
            self.publish(engine)
            self.agrees(engine)


class LossyFleet(Fleet):
    lossy = True


Fleet.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, database=None
)
LossyFleet.TestCase.settings = Fleet.TestCase.settings
TestFleet = Fleet.TestCase
TestLossyFleet = LossyFleet.TestCase


@pytest.mark.parametrize("seed", range(20))
def test_unknown_blocks_lead_to_a_snapshot_that_heals(seed: int) -> None:
    """Batches are lost and nobody counts: what an event says of a lost one is noticed, too."""
    rng = random.Random(seed)
    index, engine = KvIndex(), Engine(FIRST, 4, unsigned, cells=64, ids=8)
    healed = 0
    for _ in range(60):
        prompt = [rng.randrange(2) for _ in range(rng.choice([9, 17, 33]))]
        matched = engine.cache.match(prompt, block_hashes(prompt, 4))
        sequence = engine.cache.start(matched)
        tokens = prompt[len(sequence.tokens) :]
        assert engine.cache.reserve(len(tokens))
        engine.cache.append(sequence, tokens)
        engine.cache.finish(sequence)
        engine.cache.publish()
        batches, engine.outbox = engine.outbox, []
        for _, payload in batches:
            if rng.random() < 0.3:
                continue
            try:
                index.apply(engine.instance, decode_batch(payload).events)
            except UnknownBlockError:
                healed += 1
                index.remove(engine.instance)
                index.apply(engine.instance, engine.snapshot())
                assert set(index.blocks().get(engine.instance, [])) == engine.blocks()
                own = overlaps(index, prompt).get(engine.instance, 0)
                assert own == engine.longest_prefix(prompt)
    assert healed


async def test_the_overlap_is_what_a_simulated_engine_then_reuses() -> None:
    """Through its scheduler, with evictions, generated tokens and shared prefixes."""
    tiny = SimulatedSettings(
        cache_tokens=96, context_length=64, block_size=4, max_running=4, zero_delay=True
    )
    engine = await SimulatedEngine.start(tiny)
    index, events, rng = KvIndex(), list[KvEvent](), random.Random(5)

    def follow(batch: list[KvEvent]) -> None:
        events.extend(batch)
        index.apply(FIRST, decode_batch(encode(KvEventBatch(0.0, batch))).events)

    engine.subscribe(follow)
    chats: list[list[int]] = [[]]
    reused = 0
    for _ in range(150):
        prompt = [*rng.choice(chats[-4:]), *(rng.randrange(9) for _ in range(rng.randint(1, 9)))]
        expected = min(overlaps(index, prompt).get(FIRST, 0), (len(prompt) - 1) // 4) * 4
        result = await collect(engine, prompt, max_tokens=rng.randint(1, 9))
        assert result.items[0].cached_tokens == expected
        assert sorted(index.blocks().get(FIRST, [])) == sorted(replay(events))
        chats.append([*prompt, *result.token_ids][:40])
        reused += expected
        if rng.random() < 0.05:
            await engine.clear_cache()
            assert index.block_count(FIRST) == 0
    await engine.close()
    assert reused > 500
    assert any(isinstance(event, BlockRemoved) for event in events)


@pytest.fixture
def index() -> KvIndex:
    """A B C on the first engine, A B on the second."""
    index = KvIndex()
    index.apply(FIRST, [stored([*A, *B, *C])])
    index.apply(SECOND, [stored([*A, *B])])
    return index


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        ([*A, *B, *C, 9], {FIRST: 3, SECOND: 2}),
        ([*A, *B, *B], {FIRST: 2, SECOND: 2}),
        ([*A, *B[:3]], {FIRST: 1, SECOND: 1}),
        ([*B, *A], {}),
        (A[:3], {}),
        ([], {}),
    ],
)
def test_overlaps_count_whole_blocks_from_the_start(
    index: KvIndex, tokens: list[int], found: dict[int, int]
) -> None:
    assert overlaps(index, tokens) == found


def test_engines_that_hash_differently_share_the_tree(index: KvIndex) -> None:
    """One of them numbers its blocks, and gives another's number to a different block."""
    index.remove(SECOND)
    index.apply(SECOND, [BlockStored([1, 2], None, [*A, *B], 4)])
    index.apply(13, [BlockStored([2, 1], None, [*A, *C], 4), BlockStored([-(2**63)], 1, A, 4)])
    assert overlaps(index, [*A, *B, *C]) == {FIRST: 3, SECOND: 2, 13: 1}
    assert overlaps(index, [*A, *C, *A]) == {FIRST: 1, SECOND: 1, 13: 3}
    index.apply(13, [BlockRemoved([-(2**63), 1])])
    assert index.blocks().get(13, []) == [2]
    assert overlaps(index, [*A, *B, *C]) == {FIRST: 3, SECOND: 2, 13: 1}


def test_the_wire_may_carry_more_than_we_read() -> None:
    """Raw batches as vLLM 0.11 and SGLang send them: media, names of LoRAs, ranks."""
    raw = [
        1.5,
        [
            ["BlockStored", [2**64 - 1, -7], None, [*A, *B], 4, None, "GPU", None],
            ["BlockRemoved", [-7], "GPU"],
            ["BlockStored", [5], 2**64 - 1, C, 4, None],
        ],
        0,
    ]
    index = KvIndex()
    index.apply(FIRST, decode_batch(encode(raw)).events)
    assert overlaps(index, [*A, *C]) == {FIRST: 2}
    index.apply(FIRST, decode_batch(encode([1.6, [["AllBlocksCleared"]]])).events)
    assert overlaps(index, [*A, *C]) == {}


@pytest.mark.parametrize("later", [[*A, *B], [*A, *B, *C]])
def test_blocks_may_be_stored_again(index: KvIndex, later: list[int]) -> None:
    index.apply(SECOND, [stored(later)])
    assert overlaps(index, [*A, *B, *C])[SECOND] == len(later) // 4
    assert index.block_count(SECOND) == len(later) // 4


def test_a_block_after_one_that_never_came_is_an_error_until_replaced(index: KvIndex) -> None:
    a, b, c = block_hashes([*A, *B, *C], 4)
    lost = KvMirror()
    lost.apply([stored([*A, *B, *C]), BlockStored([77], c, C, 4)])
    with pytest.raises(UnknownBlockError, match=f"a block follows {c}, which is not cached"):
        index.apply(SECOND, [BlockStored([77], c, C, 4)])
    index.remove(SECOND)
    index.apply(SECOND, lost.events())
    assert set(index.blocks().get(SECOND, [])) == {a, b, c, 77}
    assert overlaps(index, [*A, *B, *C, *C]) == {FIRST: 3, SECOND: 4}


def test_the_removal_of_a_block_that_never_came_is_an_error(index: KvIndex) -> None:
    """The other blocks of the event are gone all the same."""
    b = block_hashes([*A, *B], 4)[1]
    with pytest.raises(UnknownBlockError, match="removed that was not cached"):
        index.apply(SECOND, [BlockRemoved([5, b, 6])])
    assert overlaps(index, [*A, *B]) == {FIRST: 2, SECOND: 1}
    assert index.block_count(SECOND) == 1


@pytest.mark.parametrize("one_event", [True, False])
def test_blocks_may_be_removed_before_those_that_follow_them(
    index: KvIndex, one_event: bool
) -> None:
    """SGLang removes a node's pages from the first to the last, and may go on elsewhere."""
    index.apply(FIRST, [stored([*C, *B])])
    chain, other = block_hashes([*A, *B, *C], 4), block_hashes([*C, *B], 4)
    gone = [*chain[1:], other[1]]
    index.apply(FIRST, [BlockRemoved(gone)] if one_event else [BlockRemoved([g]) for g in gone])
    assert index.blocks().get(FIRST, []) == [chain[0], other[0]]
    assert overlaps(index, [*A, *B, *C]) == {FIRST: 1, SECOND: 2}
    assert overlaps(index, [*C, *B]) == {FIRST: 1}
    index.apply(FIRST, [BlockStored(chain[1:], chain[0], [*B, *C], 4)])
    assert overlaps(index, [*A, *B, *C]) == {FIRST: 3, SECOND: 2}


def test_clearing_and_removing_leave_the_other_engines_alone(index: KvIndex) -> None:
    index.apply(SECOND, [AllBlocksCleared()])
    assert overlaps(index, [*A, *B, *C]) == {FIRST: 3}
    assert index.blocks().get(SECOND, []) == []
    index.apply(SECOND, [stored([*A])])
    assert overlaps(index, [*A, *B, *C]) == {FIRST: 3, SECOND: 1}
    index.remove(FIRST)
    assert overlaps(index, [*A, *B, *C]) == {SECOND: 1}
    assert index.blocks().get(FIRST, []) == []


def test_an_instance_that_was_removed_begins_with_nothing(index: KvIndex) -> None:
    index.remove(FIRST)
    with pytest.raises(UnknownBlockError):
        index.apply(FIRST, [BlockStored([1], block_hash(None, A), B, 4)])
    index.remove(FIRST)
    index.apply(FIRST, [stored(C)])
    assert overlaps(index, [*A, *B]) == {SECOND: 2}
    assert overlaps(index, C) == {FIRST: 1}


def test_unknown_instances_have_nothing_and_can_be_removed() -> None:
    index = KvIndex()
    index.remove(99)
    assert index.blocks().get(99, []) == []
    assert index.block_count(99) == 0


def test_names_of_prefixes_are_64_bit_and_equal_for_equal_prefixes_alone() -> None:
    hashes = [1, 2**64 - 1, 0, 2**61 - 1]
    names = prefix_names(hashes)
    assert len(set(names)) == 4
    assert all(0 < name < 2**64 for name in names)
    assert prefix_names(hashes[:2]) == names[:2]
    assert prefix_names(hashes[1:])[0] != names[1]


def test_an_index_under_churn_does_not_grow() -> None:
    """100,000 blocks come and go through a cache of 64; what is left is what is cached."""
    index, rng = KvIndex(), random.Random(1)
    kept: list[list[int]] = []
    memory = psutil.Process().memory_info
    before = 0
    for i in range(100_000 // 16):
        tokens = [rng.randrange(2**31) for _ in range(64)]
        index.apply(FIRST, [stored(tokens)])
        kept.append(tokens)
        if len(kept) > 4:
            index.apply(FIRST, [BlockRemoved(block_hashes(kept.pop(0), 4)[::-1])])
        if i == 500:
            before = memory().rss
    assert memory().rss - before < 8 * 2**20  # a tree that keeps them needs 4 times as much
    assert index.block_count(FIRST) == 64
    assert "".join(index._tree.dump_tree_as_events()).count('"block_hash"') == 64
    assert [overlaps(index, tokens) for tokens in kept] == [{FIRST: 16}] * 4
