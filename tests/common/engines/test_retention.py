"""Blocks that are kept for a session's next request; random requests are in `cache_driver`."""

from common.engines.block_cache import BlockCache
from common.engines.simulated import SimulatedEngine, SimulatedSettings
from common.kv import KvEvent, block_hashes
from common.protocol import GenerateRequest, SamplingParams
from tests.common.engines.cache_driver import FakeMemory, check_cache
from tests.common.engines.engine_helpers import FakeContext


class Cache:
    """A cache of 16 blocks of 4 tokens, of which 8 may be retained, and its clock."""

    def __init__(self, ids: int = 8) -> None:
        self.memory = FakeMemory(64)
        self.cache = BlockCache(self.memory, cells=64, block_size=4, max_sequences=ids)
        self.now = 0.0
        self.cache.retention.clock = lambda: self.now
        self.events: list[KvEvent] = []
        self.cache.subscribe(self.events.extend)
        self.ids = ids

    def run(self, tokens: list[int], retain_s: float = 0.0, prompt: int | None = None) -> int:
        """A whole request, of which `prompt` tokens are not its output; how many were cached."""
        matched = self.cache.match(tokens, block_hashes(tokens, 4))
        sequence = self.cache.start(matched)
        cached = len(sequence.tokens)
        assert self.cache.reserve(len(tokens) - cached)
        self.memory.write(sequence.id, cached, tokens[cached:])
        self.cache.append(sequence, tokens[cached:])
        self.cache.finish(sequence)
        if retain_s and sequence.id in self.cache.finished:
            blocks = (len(tokens) if prompt is None else prompt) // 4
            self.cache.retention.add(sequence, retain_s, blocks)
        return cached

    def cached(self, tokens: list[int]) -> int:
        return 4 * len(self.cache.match(tokens, block_hashes(tokens, 4)))

    @property
    def retained(self) -> int:
        return self.cache.retention.blocks_now()


def words(first: int, count: int) -> list[int]:
    return list(range(first, first + count))


def test_others_are_evicted_instead_though_they_came_later() -> None:
    cache = Cache()
    cache.run(session := words(0, 25), 30.0)
    for number in range(1, 8):
        cache.run(words(100 * number, 21))
    assert cache.cached(session) == 24
    assert cache.retained == 6
    cache.run(words(900, 60))  # what else can it do
    assert cache.cached(session) < 24
    assert cache.retained == 0


def test_when_the_time_is_over_it_is_the_least_recent_one() -> None:
    cache = Cache()
    cache.run(session := words(0, 25), 30.0)
    cache.run(words(100, 21))
    cache.now = 30.0
    assert cache.retained == 0
    cache.run(words(200, 21))
    assert cache.cached(session) < 24
    assert cache.cached(words(100, 21)) == 20


def test_half_of_the_cache_may_be_retained_and_the_oldest_retention_is_lost() -> None:
    cache = Cache()
    for number in range(3):
        cache.run(words(100 * number, 13), 30.0)
    assert cache.retained == 6
    assert 0 not in [cache.cached(words(100 * number, 13)) for number in range(3)]
    cache.run(words(300, 37), 30.0)  # nine blocks are more than half
    assert cache.retained == 6
    cache.run(words(400, 13), 30.0)
    for number in range(5, 8):
        cache.run(words(100 * number, 17))
    assert [cache.cached(words(100 * number, 13)) for number in (0, 1, 2, 4)] == [0, 0, 12, 12]


def test_what_is_over_takes_no_room_from_a_retention_that_holds() -> None:
    cache = Cache()
    cache.run(session := words(0, 17), 60.0)
    cache.run(words(100, 17), 1.0)
    cache.now = 2.0
    cache.run(words(200, 17), 60.0)
    assert cache.retained == 8
    cache.run(words(300, 32))
    assert cache.cached(session) == 16


def test_the_next_request_of_the_session_takes_it_up() -> None:
    """Although it does not repeat the output as it was."""
    cache = Cache()
    turn = words(0, 18)
    cache.run([*turn, *words(500, 4)], 30.0, prompt=18)
    assert cache.retained == 5
    assert cache.run([*turn, *words(600, 9)], 30.0) == 16
    assert cache.retained == 6


def test_who_shares_a_beginning_takes_nothing_up() -> None:
    cache = Cache()
    system = words(0, 8)
    cache.run([*system, *words(100, 9)], 30.0)
    assert cache.run([*system, *words(200, 9)]) == 8
    assert cache.retained == 4


def test_shared_blocks_count_once() -> None:
    cache = Cache()
    system = words(0, 16)
    for number in range(1, 5):
        cache.run([*system, *words(100 * number, 5)], 30.0)
    assert cache.retained == 4 + 4
    check_cache(cache.cache, cache.memory, cache.events, cache.ids)


def test_an_id_is_taken_from_who_is_not_retained() -> None:
    cache = Cache(ids=2)
    cache.run(session := words(0, 9), 30.0)
    cache.run(words(100, 9))
    cache.run(words(200, 9))
    assert cache.cached(session) == 8
    cache.run(words(300, 9), 30.0)
    cache.run(words(400, 9))  # an id has to come from somewhere
    assert cache.cached(session) == 0
    assert cache.cached(words(300, 9)) == 8


def test_clearing_the_cache_ends_every_retention() -> None:
    cache = Cache()
    cache.run(words(0, 25), 30.0)
    cache.cache.clear()
    assert cache.retained == 0
    assert not cache.cache.index


async def test_an_engine_keeps_a_session_while_its_tool_runs() -> None:
    """Cancelled ones as well: a stop string ends a request that way."""
    engine = await SimulatedEngine.start(
        SimulatedSettings(cache_tokens=1024, max_running=2, decode_base_ms=1.0)
    )

    async def ask(tokens: list[int], retain_s: float = 0.0, *, leave: bool = False) -> int:
        context = FakeContext()
        sampling = SamplingParams(max_tokens=4)
        cached = 0
        request = GenerateRequest(tokens, sampling, retain_s=retain_s)
        async for item in engine.generate(request, context):
            cached += item.cached_tokens or 0
            if leave:
                context.stop()
        return cached

    try:
        for leave in (False, True):
            session = words(0, 300)
            await ask(session, 600.0, leave=leave)
            assert engine.metrics().retained_blocks == 18
            for number in range(1, 9):
                await ask(words(1000 * number, 300))
            assert await ask([*session, *words(300, 20)]) >= 288
            assert engine.metrics().retained_blocks == 0
            await engine.clear_cache()
    finally:
        await engine.close()
