"""What the router believes of one engine between its figures."""

from chapter3.active import ActiveRequests
from chapter3.engine_load import EngineLoad
from chapter3.snapshot import WorkerView
from chapter3.workers import Worker
from tests.chapter3.fleet import load, source

import pytest

START = 1000.0


@pytest.fixture
def worker() -> Worker:
    """One with 100 blocks of 4 tokens, idle."""
    worker = Worker(7, source(3), synced=True)
    worker.hear(load(), START)
    return worker


def seen(worker: Worker, now: float, names: list[int] | None = None, cached: int = 0) -> WorkerView:
    return worker.view(
        names or [],
        cached,
        prompt_tokens=max(4 * len(names or []), 1),
        cached_blocks=0,
        load=EngineLoad(),
        now=now,
    )


def figures(worker: Worker, now: float = START) -> tuple[int, int, int]:
    view = seen(worker, now)
    return view.running, view.waiting, view.used_blocks


def test_a_view_is_the_engines_figures_and_the_routers() -> None:
    active = ActiveRequests()
    active.add("a", 7, prefill_tokens=80, names=[1, 2, 8], own_blocks=2, now=START)
    active.add("b", 7, prefill_tokens=8, names=[1, 2], own_blocks=3, now=START)
    active.first_token("b", START)
    worker = Worker(7, source(3, block_size=8), synced=True, turn=5, tags=frozenset({"big"}))
    worker.hear(load(running=4, used_blocks=25), START)
    view = worker.view(
        [1, 2, 3], 2, prompt_tokens=28, cached_blocks=60, load=active.load(7), now=START
    )
    expected = {
        "instance_id": 7,
        "worker_id": 3,
        "block_size": 8,
        "prompt_blocks": 3.5,
        "overlap_blocks": 2,
        "running": 4,
        "used_blocks": 25,
        "total_blocks": 100,
        "cached_blocks": 60,
        "prefill_tokens": 80,
        "prefill_requests": 1,
        "decode_requests": 1,
        "active_blocks": 8,
        "active_prompt_blocks": 3,
        "new_prompt_blocks": 1,
        "prefill_s": active.load(7).prefill_s(START),
        "prefill_tokens_per_s": active.load(7).prefill_tokens_per_s,
        "turn": 5,
        "tags": frozenset({"big"}),
    }
    assert {name: getattr(view, name) for name in expected} == expected
    assert view.new_tokens == 12


def test_an_engine_that_has_sent_no_figures_yet_is_idle() -> None:
    view = seen(Worker(7, source(total_blocks=50)), START)
    assert (view.running, view.waiting, view.used_blocks, view.total_blocks) == (0, 0, 0, 50)


def test_what_was_routed_counts_at_once(worker: Worker) -> None:
    """With the blocks it will newly use, the last one in part: 5 of 7, and 3 of 3."""
    worker.expect([1, 2, 3, 4, 5, 6], 2, START)
    assert figures(worker) == (1, 0, 5)
    worker.expect([8, 9], 0, START)
    assert figures(worker) == (2, 0, 8)


def test_what_was_routed_joins_the_queue_if_there_is_one(worker: Worker) -> None:
    worker.hear(load(running=8, waiting=1, used_blocks=90), START)
    worker.expect([1], 0, START)
    assert figures(worker) == (8, 2, 92)


def test_the_cache_is_never_more_than_full(worker: Worker) -> None:
    worker.hear(load(used_blocks=99), START)
    worker.expect(list(range(50)), 0, START)
    assert figures(worker)[2] == 100


def test_figures_of_over_a_tenth_of_a_second_later_include_what_was_routed(
    worker: Worker,
) -> None:
    worker.expect([1], 0, START)
    worker.expect([2], 0, START + 0.06)
    worker.hear(load(), START + 0.06)  # too soon to tell of either
    assert figures(worker)[0] == 2
    assert figures(worker, START + 0.12)[0] == 2  # time alone changes nothing
    worker.hear(load(running=1), START + 0.12)
    assert figures(worker) == (2, 0, 2)
    worker.hear(load(running=2, used_blocks=4), START + 0.18)
    assert figures(worker) == (2, 0, 4)


def test_a_prompt_counts_as_cached_where_it_was_sent_for_ten_seconds(worker: Worker) -> None:
    worker.expect([1, 2, 3], 0, START)
    assert seen(worker, START, [1, 2, 3, 4]).overlap_blocks == 3
    assert worker.overlap([1, 2, 9], 0, START) == 2
    assert worker.overlap([9, 2, 3], 0, START) == 0
    assert worker.overlap([], 0, START) == 0
    assert worker.overlap([1, 2, 3, 4], 0, START + 9.9) == 3
    assert worker.overlap([1, 2, 3, 4], 0, START + 10.1) == 0


def test_what_is_expected_goes_on_where_the_cache_ends(worker: Worker) -> None:
    """Only the blocks that were not cached are predicted: cached ones may be evicted any time."""
    worker.expect([1, 2, 3, 4], 2, START)
    for cached, overlap in ((2, 4), (3, 4), (5, 5), (1, 1)):
        assert worker.overlap([1, 2, 3, 4, 5], cached, START) == overlap


def test_a_prompt_that_is_sent_again_counts_ten_seconds_from_then(worker: Worker) -> None:
    worker.expect([1, 2], 0, START)
    worker.expect([1, 3], 0, START + 8)
    worker.expect([7], 0, START + 12)  # what is over is forgotten on the way
    assert worker.overlap([1, 3], 0, START + 12) == 2
    assert worker.overlap([1, 2], 0, START + 12) == 1


def test_predictions_are_kept_no_longer_than_they_count(worker: Worker) -> None:
    """Over an hour of new prompts, as many as come in ten seconds; also with no figures."""
    for second in range(3600):
        worker.expect([*range(second * 8, second * 8 + 8)], 0, START + second)
        assert len(worker._prefixes) <= 11 * 8
        assert len(worker._expected) <= 11
        assert len(worker._routed) <= 11
    worker.hear(load(), START + 3600)
    assert figures(worker) == (0, 0, 0)


def test_a_failure_ends_all_that_was_expected(worker: Worker) -> None:
    worker.hear(load(running=5, used_blocks=50), START)
    worker.expect([1, 2], 0, START)
    worker.forget()
    assert (worker.synced, worker.failed) == (False, True)
    assert figures(worker) == (0, 0, 0)
    assert worker.overlap([1, 2], 0, START) == 0


def test_an_engine_is_silent_after_three_seconds_without_figures(worker: Worker) -> None:
    assert not worker.is_silent(START + 3)
    assert worker.is_silent(START + 3.1)
    worker.hear(load(), START + 3.1)
    assert not worker.is_silent(START + 3.1)
