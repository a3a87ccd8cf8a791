"""The engine in virtual time: its times against sums done by hand, and what it has cached."""

from benchmarks.trace import BLOCK_SIZE, TraceRequest
from benchmarks.trace_cache import BlockCache
from benchmarks.trace_engine import EngineSettings, Running, TraceEngine

import pytest

# A step takes 10 ms, 1 ms more for each request that decodes, and 100 ms for 100 prompt tokens.
SIMPLE = EngineSettings(
    cache_blocks=1000,
    prefill_tokens_per_s=1000.0,
    prefill_chunk=100,
    decode_base_ms=10.0,
    decode_ms_per_request=1.0,
    decode_ms_per_1k_kv_tokens=0.0,
)


class Heard:
    """What the engine has told, in order."""

    def __init__(self) -> None:
        self.stored_blocks: list[int] = []
        self.removed_blocks: list[int] = []

    def first_token(self, running: Running, now: float) -> None:
        assert running.first_token == now

    def finished(self, running: Running, now: float) -> None:
        assert running.finished == now

    def stored(self, instance: int, request: TraceRequest, first: int) -> None:
        self.stored_blocks += request.full_blocks[first:]

    def removed(self, instance: int, blocks: list[int]) -> None:
        self.removed_blocks += blocks


def asks(arrived: float, tokens: int, output: int, blocks: list[int] | None = None) -> Running:
    """A request; unless told otherwise its blocks are in no other."""
    count = -(-tokens // BLOCK_SIZE)
    own = [round(arrived * 1000) * 1000 + 500 + number for number in range(count)]
    return Running("", TraceRequest(arrived * 1e3, tokens, output, blocks or own), arrived)


def lives(
    *requests: Running, settings: EngineSettings = SIMPLE, until: float = float("inf")
) -> tuple[TraceEngine, Heard]:
    """An engine that gets the requests when they arrive."""
    heard = Heard()
    engine = TraceEngine(3, settings, heard)
    waiting = list(requests)
    while True:
        arrival = waiting[0].arrived if waiting else float("inf")
        now = min(arrival, engine.next_event())
        if now == float("inf") or now > until:
            return engine, heard
        engine.advance(now)
        if now == arrival:
            engine.submit(waiting.pop(0))
        else:
            engine.happen()


def test_one_request() -> None:
    """11 ms for 10 tokens of its prompt and one step more; then 10 steps of 11 ms."""
    request = asks(2.0, 1000, 11)
    engine, _ = lives(request)
    assert request.started == 2.0
    assert request.first_token == pytest.approx(2.0 + 1.1 + 0.01)
    assert request.finished == pytest.approx(3.11 + 10 * 0.011)
    assert engine.busy_s == pytest.approx(1.22)
    assert engine.prefilled_tokens == 1000


def test_an_answer_of_one_token_ends_with_it() -> None:
    request = asks(0.0, 1000, 1)
    lives(request)
    assert request.finished == request.first_token == pytest.approx(1.11)


def test_prompts_are_computed_first_come_first_served() -> None:
    first, second = asks(0.0, 1000, 1), asks(0.5, 100, 1)
    lives(first, second)
    assert second.started == first.first_token == pytest.approx(1.11)
    assert second.first_token == pytest.approx(1.11 + 0.12)


def test_a_prompt_slows_down_what_decodes_and_is_slowed_down_by_it() -> None:
    """The first one's 10 steps, then 100 ms longer ones with the prompt, then 11 ms again."""
    first, second = asks(0.0, 1000, 1001), asks(1.22, 1000, 1)
    lives(first, second)
    assert second.first_token is not None
    assert second.first_token == pytest.approx(1.22 + 1000 * 0.111 / 100 + 0.011)
    steps = 10 + (second.first_token - 1.22) / 0.111
    assert first.finished == pytest.approx(second.first_token + (1000 - steps) * 0.011)


def test_requests_decode_together() -> None:
    """Both have their prompts computed at 1.232 s; from then on a step takes 12 ms for both."""
    first, second = asks(0.0, 1000, 101), asks(1.11, 1, 51)
    lives(first, second)
    assert second.first_token is not None
    assert second.finished is not None
    assert second.finished == pytest.approx(second.first_token + 50 * 0.012)
    taken = (second.first_token - 1.11) / 0.111 + 50
    assert first.finished == pytest.approx(second.finished + (100 - taken) * 0.011)


def test_a_step_reads_the_tokens_of_those_that_decode() -> None:
    settings = EngineSettings(
        prefill_tokens_per_s=1000.0,
        prefill_chunk=100,
        decode_base_ms=10.0,
        decode_ms_per_request=0.0,
        decode_ms_per_1k_kv_tokens=1.0,
    )
    request = asks(0.0, 3000, 11)
    lives(request, settings=settings)
    assert request.first_token is not None
    assert request.finished == pytest.approx(request.first_token + 10 * 0.013)


def test_full_blocks_that_were_computed_are_reused() -> None:
    first, second = asks(0.0, 1200, 1, [1, 2, 3]), asks(5.0, 1624, 1, [1, 2, 3, 4])
    engine, heard = lives(first, second)
    assert (first.cached_tokens, second.cached_tokens) == (0, 1024)
    assert second.first_token == pytest.approx(5.0 + 600 * 0.0011 + 0.01)
    assert heard.stored_blocks == [1, 2, 3]
    assert engine.prefilled_tokens == 1800


def test_the_last_token_of_a_prompt_is_computed_even_if_all_is_cached() -> None:
    first, second = asks(0.0, 1024, 1, [1, 2]), asks(5.0, 1024, 1, [1, 2])
    _, heard = lives(first, second)
    assert second.cached_tokens == 1023
    assert heard.stored_blocks == [1, 2]


def test_a_prompt_reuses_what_those_before_it_in_the_queue_have_computed() -> None:
    first, second = asks(0.0, 1100, 1, [1, 2, 8]), asks(0.1, 1100, 1, [1, 2, 9])
    lives(first, second)
    assert second.started == first.first_token
    assert second.cached_tokens == 1024


def test_a_request_waits_until_the_cache_has_room_for_its_prompt_and_its_answer() -> None:
    """Four blocks of 512 tokens: the first request takes three of them, and the second two."""
    settings = EngineSettings(**{**vars(SIMPLE), "cache_blocks": 4})
    requests = asks(0.0, 1000, 500), asks(0.1, 500, 100), asks(0.2, 10, 10)
    engine, _ = lives(*requests, settings=settings, until=2.0)
    metrics = engine.metrics
    assert (metrics.running, metrics.waiting) == (1, 2)
    assert (metrics.used_blocks, metrics.total_blocks) == (3, 4)
    requests = asks(0.0, 1000, 500), asks(0.1, 500, 100), asks(0.2, 10, 10)
    engine, heard = lives(*requests, settings=settings)
    assert requests[1].started == pytest.approx(requests[0].finished)
    assert requests[2].started == requests[1].first_token
    assert engine.metrics.used_blocks == 0
    assert heard.removed_blocks == []


def test_what_is_cached_is_evicted_for_what_is_admitted() -> None:
    settings = EngineSettings(**{**vars(SIMPLE), "cache_blocks": 4})
    first, second = asks(0.0, 1536, 1, [1, 2, 3]), asks(9.0, 600, 1, [7, 8])
    first_again = asks(19.0, 1600, 1, [1, 2, 3, 4])
    _, heard = lives(first, second, settings=settings)
    assert heard.removed_blocks == [3]
    assert heard.stored_blocks == [1, 2, 3, 7]
    first = asks(0.0, 1536, 1, [1, 2, 3])
    lives(first, second, first_again, settings=settings)
    assert first_again.cached_tokens == 1024


def test_a_request_that_is_larger_than_the_cache_runs_alone() -> None:
    settings = EngineSettings(**{**vars(SIMPLE), "cache_blocks": 2})
    large, small = asks(0.0, 2000, 10), asks(0.1, 100, 10)
    engine, heard = lives(large, small, settings=settings)
    assert small.started == large.finished
    assert len(heard.stored_blocks) - len(heard.removed_blocks) <= 2
    assert engine.cache.used == 0


def test_no_more_requests_run_than_may() -> None:
    settings = EngineSettings(**{**vars(SIMPLE), "max_running": 2})
    requests = [asks(0.0, 100, 100), asks(0.01, 100, 200), asks(0.02, 100, 10)]
    lives(*requests, settings=settings)
    assert requests[1].started is not None
    assert requests[1].started < 1
    assert requests[2].started == requests[0].finished


def test_the_least_recently_used_block_goes_first_and_a_prefix_from_its_end() -> None:
    cache = BlockCache(5)
    cache.hold([1, 2, 3])
    cache.hold([1, 4])
    cache.release([1, 2, 3])  # 1 is still held
    cache.release([1, 4])
    cache.hold([2])
    cache.release([2])
    assert cache.evict() == []
    order = []
    for _ in range(4):
        cache.own += 1
        order += cache.evict()
    assert order == [3, 4, 1]
    assert cache.match([2]) == 1
    cache.own += 1
    assert cache.evict() == [2]


def test_room_counts_what_matched_and_is_not_held_yet() -> None:
    cache = BlockCache(4)
    cache.hold([1, 2])
    cache.release([1, 2])
    cache.hold([3])
    assert cache.match([1, 2, 5, 3]) == 2
    assert cache.has_room([1, 2], 1)
    assert not cache.has_room([1, 2], 2)
    assert cache.has_room([], 3)


def test_the_time_to_finish_is_exact_for_an_idle_engine() -> None:
    """If the length of a step does not depend on how many decode."""
    settings = EngineSettings(**{**vars(SIMPLE), "decode_ms_per_request": 0.0})
    engine, _ = lives(asks(0.0, 1024, 10, [1, 2]), settings=settings)
    request = asks(9.0, 1600, 40, [1, 2, 3, 4])
    expected = engine.seconds_to_finish(request.request)
    engine.advance(9.0)
    engine.submit(request)
    while engine.next_event() < float("inf"):
        engine.advance(engine.next_event())
        engine.happen()
    assert request.finished == pytest.approx(9.0 + expected)


@pytest.mark.parametrize("shared", [0, 2])
def test_the_time_to_finish_counts_those_before(shared: int) -> None:
    """With what they will have cached, and with what the first has left to compute."""
    before = [
        asks(0.0, 20_000, 5, [*range(1, shared + 1), *range(100, 140 - shared)]),
        asks(0.1, 8_000, 5, [*range(1, shared + 1), *range(200, 216 - shared)]),
        asks(0.2, 12_000, 5, [*range(1, shared + 1), *range(300, 324 - shared)]),
    ]
    engine, _ = lives(*before, until=7.0)
    request = asks(7.0, 6_000, 20, [*range(1, shared + 1), *range(400, 412 - shared)])
    engine.advance(7.0)
    expected = engine.seconds_to_finish(request.request)
    engine.submit(request)
    while engine.next_event() < float("inf"):
        engine.advance(engine.next_event())
        engine.happen()
    assert request.finished == pytest.approx(7.0 + expected, rel=0.02)
    assert request.cached_tokens == shared * BLOCK_SIZE
