"""What the router believes of one engine between its figures, on a clock that the test sets."""

import chapter2.workers
from chapter2.workers import Worker
from common.protocol_router import Candidate
from tests.chapter2.fleet import Clock, load, source

import pytest


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(chapter2.workers, "time", clock)
    return clock


@pytest.fixture
def worker(clock: Clock) -> Worker:
    """One with 100 blocks, idle."""
    worker = Worker(7, source(3), synced=True)
    worker.hear(load())
    return worker


def seen(worker: Worker) -> tuple[int, int, float]:
    candidate = worker.candidate([], 0)
    return candidate.running, candidate.waiting, candidate.kv_usage


def test_a_candidate_is_the_engines_figures(worker: Worker) -> None:
    worker.hear(load(running=4, waiting=0, used_blocks=25))
    assert worker.candidate([1, 2, 3], 2) == Candidate(7, 3, 2, 0.25, 4, 0)


def test_an_engine_that_has_sent_no_figures_yet_is_idle(clock: Clock) -> None:
    assert seen(Worker(7, source(total_blocks=50))) == (0, 0, 0.0)


def test_what_was_routed_counts_at_once(worker: Worker) -> None:
    """With the blocks it will newly use, the last one in part: 5 of 7, and 3 of 3."""
    worker.expect([1, 2, 3, 4, 5, 6], overlap=2)
    assert seen(worker) == (1, 0, 0.05)
    worker.expect([8, 9], overlap=0)
    assert seen(worker) == (2, 0, 0.08)


def test_what_was_routed_joins_the_queue_if_there_is_one(worker: Worker) -> None:
    worker.hear(load(running=8, waiting=1, used_blocks=90))
    worker.expect([1], overlap=0)
    assert seen(worker) == (8, 2, 0.92)


def test_the_cache_is_never_more_than_full(worker: Worker) -> None:
    worker.hear(load(used_blocks=99))
    worker.expect(list(range(50)), overlap=0)
    assert seen(worker)[2] == 1.0


def test_figures_of_over_a_tenth_of_a_second_later_include_what_was_routed(
    worker: Worker, clock: Clock
) -> None:
    worker.expect([1], overlap=0)
    clock.now += 0.06
    worker.expect([2], overlap=0)
    worker.hear(load())  # too soon to tell of either
    assert seen(worker)[0] == 2
    clock.now += 0.06
    assert seen(worker)[0] == 2  # time alone changes nothing
    worker.hear(load(running=1))
    assert seen(worker) == (2, 0, 0.02)
    clock.now += 0.06
    worker.hear(load(running=2, used_blocks=4))
    assert seen(worker) == (2, 0, 0.04)


def test_a_prompt_counts_as_cached_where_it_was_sent_for_ten_seconds(
    worker: Worker, clock: Clock
) -> None:
    worker.expect([1, 2, 3], overlap=0)
    assert worker.overlap([1, 2, 3, 4], cached=0) == 3
    assert worker.overlap([1, 2, 9], cached=0) == 2
    assert worker.overlap([9, 2, 3], cached=0) == 0
    assert worker.overlap([], cached=0) == 0
    clock.now += 9.9
    assert worker.overlap([1, 2, 3, 4], cached=0) == 3
    clock.now += 0.2
    assert worker.overlap([1, 2, 3, 4], cached=0) == 0


def test_what_is_expected_goes_on_where_the_cache_ends(worker: Worker, clock: Clock) -> None:
    """Only the blocks that were not cached are predicted: cached ones may be evicted any time."""
    worker.expect([1, 2, 3, 4], overlap=2)
    assert worker.overlap([1, 2, 3, 4, 5], cached=2) == 4
    assert worker.overlap([1, 2, 3, 4, 5], cached=3) == 4
    assert worker.overlap([1, 2, 3, 4, 5], cached=5) == 5
    assert worker.overlap([1, 2, 3, 4, 5], cached=1) == 1


def test_a_prompt_that_is_sent_again_counts_ten_seconds_from_then(
    worker: Worker, clock: Clock
) -> None:
    worker.expect([1, 2], overlap=0)
    clock.now += 8
    worker.expect([1, 3], overlap=0)
    clock.now += 4
    worker.expect([7], overlap=0)  # what is over is forgotten on the way
    assert worker.overlap([1, 3], cached=0) == 2
    assert worker.overlap([1, 2], cached=0) == 1


def test_predictions_are_kept_no_longer_than_they_count(worker: Worker, clock: Clock) -> None:
    """Over an hour of new prompts, as many as come in ten seconds; also with no figures."""
    for i in range(3600):
        clock.now += 1
        worker.expect([*range(i * 8, i * 8 + 8)], overlap=0)
        assert len(worker._prefixes) <= 11 * 8
        assert len(worker._expected) <= 11
        assert len(worker._routed) <= 11
    worker.hear(load())
    clock.now += 0.2
    worker.hear(load())
    assert seen(worker) == (0, 0, 0.0)


def test_a_failure_ends_all_that_was_expected(worker: Worker) -> None:
    worker.hear(load(running=5, used_blocks=50))
    worker.expect([1, 2], overlap=0)
    worker.forget()
    assert (worker.synced, worker.failed) == (False, True)
    assert seen(worker) == (0, 0, 0.0)
    assert worker.overlap([1, 2], cached=0) == 0


def test_an_engine_is_silent_after_three_seconds_without_figures(
    worker: Worker, clock: Clock
) -> None:
    clock.now += 3
    assert not worker.is_silent(clock.now)
    clock.now += 0.1
    assert worker.is_silent(clock.now)
    worker.hear(load())
    assert not worker.is_silent(clock.now)
