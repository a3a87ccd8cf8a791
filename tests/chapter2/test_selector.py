"""Whole decisions without a network: what is cached, what is known of the load, who may run it."""

import random
from collections import Counter

import chapter2.selector
import chapter2.workers
from chapter2.selector import Selector
from common.kv import BlockRemoved, block_hashes
from common.protocol import PipelineError
from common.protocol_router import Policy, WorkerState
from tests.chapter2.fleet import MODEL, Clock, add_engine, load, source, stored

import pytest

A, B, C, D = [1] * 4, [2] * 4, [3] * 4, [4] * 4
FIRST, SECOND, THIRD = 101, 102, 103


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(chapter2.workers, "time", clock)
    monkeypatch.setattr(chapter2.selector, "time", clock)
    return clock


def fleet(clock: Clock, policy: Policy = "kv", *, engines: int = 2, seed: int = 0) -> Selector:
    """Idle engines of 100 blocks of 4 tokens: workers 0, 1, ... are instances 101, 102, ..."""
    selector = Selector(policy, seed)
    for i in range(engines):
        add_engine(selector, FIRST + i, clock, source(i)).hear(load())
    return selector


def test_the_answer_has_the_choice_and_every_engines_score(clock: Clock) -> None:
    """Worker 0: 2 * 2/4 - 0.25 - 1/2. Worker 1: 2 * 0/4 - 0.5 - 2/2."""
    selector = fleet(clock)
    selector.index.apply(FIRST, [stored([*A, *B])])
    selector.workers[FIRST].hear(load(running=3, waiting=1, used_blocks=25))
    selector.workers[SECOND].hear(load(running=3, waiting=2, used_blocks=50))
    output = selector.select([*A, *B, *C, *D], MODEL)
    assert (output.instance_id, output.worker_id) == (FIRST, 0)
    assert (output.overlap_blocks, output.overlap_tokens) == (2, 8)
    assert [(c.instance_id, c.score) for c in output.candidates] == [
        (FIRST, 0.25),
        (SECOND, -1.5),
    ]
    assert output.reason.startswith("best score of 2: 2 blocks cached, 25% of the KV cache in use")
    assert output.error is None


def test_equal_prompts_follow_the_first_before_any_event_comes(clock: Clock) -> None:
    selector = fleet(clock, engines=4)
    first = selector.select([*A, *B, 1], MODEL)
    assert first.overlap_blocks == 0
    for _ in range(5):
        again = selector.select([*A, *B, 2], MODEL)
        assert again.instance_id == first.instance_id
        assert again.overlap_blocks == 2
    clock.now += 10.1
    for known in selector.workers.values():
        known.hear(load())
    assert selector.select([*A, *B, 2], MODEL).overlap_blocks == 0


def test_events_take_over_from_the_prediction(clock: Clock) -> None:
    selector = fleet(clock)
    tokens = [*A, *B]
    instance = selector.select(tokens, MODEL).instance_id
    selector.index.apply(instance, [stored(tokens)])
    clock.now += 10.1
    for known in selector.workers.values():
        known.hear(load())
    assert selector.select(tokens, MODEL).overlap_blocks == 2
    selector.index.apply(instance, [BlockRemoved(block_hashes(tokens, 4)[::-1])])
    assert selector.select(tokens, MODEL).overlap_blocks == 0


@pytest.mark.parametrize("policy", ["kv", "least_loaded", "round_robin"])
def test_a_burst_of_different_prompts_is_spread_evenly(clock: Clock, policy: Policy) -> None:
    """No engine's figures change in between: what was just routed must count."""
    selector = fleet(clock, policy, engines=3)
    counts: Counter[int] = Counter()
    for i in range(99):
        counts[selector.select([100 + i] * 9, MODEL).instance_id] += 1
        assert max(counts.values()) - min(counts[FIRST + j] for j in range(3)) <= 1
    assert counts == {FIRST: 33, SECOND: 33, THIRD: 33}


def test_random_choices_follow_the_seed(clock: Clock) -> None:
    def picks(seed: int) -> list[int]:
        selector = fleet(clock, "random", engines=3, seed=seed)
        return [selector.select(A, MODEL).instance_id for _ in range(60)]

    assert picks(1) == picks(1) != picks(2)
    assert set(picks(1)) == {FIRST, SECOND, THIRD}


def test_round_robin_goes_on_when_engines_come_and_leave(clock: Clock) -> None:
    selector = fleet(clock, "round_robin", engines=2)

    def next_() -> int:
        return selector.select(A, MODEL).instance_id

    assert [next_() for _ in range(3)] == [FIRST, SECOND, FIRST]
    add_engine(selector, THIRD, clock, source(2))
    assert [next_() for _ in range(4)] == [THIRD, SECOND, FIRST, THIRD]
    selector.remove(SECOND)
    assert [next_() for _ in range(3)] == [FIRST, THIRD, FIRST]


def test_every_policy_reports_what_is_cached(clock: Clock) -> None:
    for policy in ("random", "round_robin", "least_loaded", "kv"):
        selector = fleet(clock, policy, engines=1)
        selector.index.apply(FIRST, [stored([*A, *B])])
        output = selector.select([*A, *B, *C], MODEL)
        assert (output.overlap_blocks, output.overlap_tokens) == (2, 8)


def test_a_failed_engine_is_left_out_with_all_that_it_had(clock: Clock) -> None:
    selector = fleet(clock)
    selector.index.apply(FIRST, [stored([*A, *B])])
    assert selector.select([*A, *B], MODEL).instance_id == FIRST
    selector.fail(FIRST)
    assert selector.index.block_count(FIRST) == 0
    for _ in range(3):
        output = selector.select([*A, *B], MODEL)
        assert [c.instance_id for c in output.candidates] == [SECOND]
    selector.fail(999)  # has left meanwhile


def test_an_engine_that_left_is_gone(clock: Clock) -> None:
    selector = fleet(clock)
    selector.index.apply(FIRST, [stored(A)])
    selector.remove(FIRST)
    selector.remove(FIRST)
    assert list(selector.workers) == [SECOND]
    assert selector.index.block_count(FIRST) == 0
    output = selector.select(A, MODEL)
    assert (output.instance_id, output.overlap_blocks) == (SECOND, 0)


def test_silent_engines_are_chosen_only_if_there_is_no_other(clock: Clock) -> None:
    selector = fleet(clock)
    selector.index.apply(FIRST, [stored([*A, *B])])
    clock.now += 3.1
    selector.workers[SECOND].hear(load(running=50, waiting=9, used_blocks=100))
    assert selector.select([*A, *B], MODEL).instance_id == SECOND
    clock.now += 3.1
    output = selector.select([*A, *B], MODEL)
    assert len(output.candidates) == 2
    assert output.instance_id == FIRST


def test_an_excluded_engine_is_not_a_candidate(clock: Clock) -> None:
    selector = fleet(clock)
    selector.index.apply(FIRST, [stored(A)])
    output = selector.select(A, MODEL, excluded=[FIRST, 999])
    assert [c.instance_id for c in output.candidates] == [SECOND]


def test_only_engines_with_the_model_are_candidates(clock: Clock) -> None:
    selector = fleet(clock, engines=1)
    add_engine(selector, SECOND, clock, source(1, model="another"))
    for model, instance in ((MODEL, FIRST), ("another", SECOND)):
        for _ in range(3):
            output = selector.select(A, model)
            assert [c.instance_id for c in output.candidates] == [instance]


def test_the_error_says_what_became_of_every_engine(clock: Clock) -> None:
    selector = Selector("kv")
    with pytest.raises(PipelineError) as raised:
        selector.select(A, MODEL)
    assert raised.value.info.kind == "unavailable"
    none = "No engine with the model a-model is ready (there is none at all)."
    assert raised.value.info.message == none
    add_engine(selector, FIRST, clock, source(0)).synced = False
    add_engine(selector, SECOND, clock, source(1, model="another"))
    add_engine(selector, THIRD, clock, source(2))
    selector.fail(THIRD)
    with pytest.raises(PipelineError) as raised:
        selector.select(A, MODEL)
    assert raised.value.info.message == (
        "No engine with the model a-model is ready (worker 0 with a-model is starting, "
        "worker 1 with another is ready, worker 2 with a-model is failed)."
    )


def test_a_request_that_was_refused_counts_nowhere(clock: Clock) -> None:
    selector = fleet(clock)
    with pytest.raises(PipelineError):
        selector.select(A, "another")
    assert [c.running for c in selector.select(A, MODEL).candidates] == [0, 0]


def test_engines_of_two_block_sizes_are_compared_by_tokens(clock: Clock) -> None:
    """Of 16 tokens one has cached 12 in three blocks of 4, the other 8 in a block of 8."""
    selector = fleet(clock, engines=1)
    add_engine(selector, SECOND, clock, source(1, block_size=8)).hear(load())
    tokens = [*A, *B, *C, *D]
    selector.index.apply(FIRST, [stored([*A, *B, *C])])
    selector.index.apply(SECOND, [stored([*A, *B], 8)])
    output = selector.select(tokens, MODEL)
    assert (output.instance_id, output.overlap_blocks, output.overlap_tokens) == (FIRST, 3, 12)
    assert [(c.overlap_blocks, c.score) for c in output.candidates] == [(3, 1.5), (1, 1.0)]
    selector.index.remove(SECOND)
    selector.index.apply(SECOND, [stored(tokens, 8)])
    output = selector.select(tokens, MODEL, excluded=[FIRST])
    assert (output.instance_id, output.overlap_blocks, output.overlap_tokens) == (SECOND, 2, 16)


@pytest.mark.parametrize("tokens", [[], [1, 2, 3]])
def test_a_prompt_shorter_than_a_block_goes_by_load(clock: Clock, tokens: list[int]) -> None:
    selector = fleet(clock)
    selector.workers[FIRST].hear(load(used_blocks=10))
    output = selector.select(tokens, MODEL)
    assert (output.instance_id, output.overlap_blocks, output.overlap_tokens) == (SECOND, 0, 0)
    assert [c.score for c in output.candidates] == [-0.1, 0.0]


def test_the_state_is_what_the_router_believes(clock: Clock) -> None:
    selector = fleet(clock, engines=1)
    known = selector.workers[FIRST]
    selector.index.apply(FIRST, [stored([*A, *B])])
    expected = WorkerState(FIRST, 0, MODEL, "ready", 2, load())
    assert selector.state(known, []) == expected
    expected.block_hashes = block_hashes([*A, *B], 4)
    assert selector.state(known, selector.index.blocks()[FIRST]) == expected
    clock.now += 3.1
    assert selector.state(known, []).state == "silent"
    selector.fail(FIRST)
    assert selector.state(known, []) == WorkerState(FIRST, 0, MODEL, "failed", 0)
    known.synced, known.failed = False, False
    assert selector.state(known, []).state == "starting"


def test_decisions_of_a_week_leave_nothing_behind(clock: Clock) -> None:
    """Prompts, engines and their blocks come and go; what is kept is of the last ten seconds."""
    selector, rng = fleet(clock, engines=4), random.Random(0)
    instance = 200
    for i in range(3000):
        clock.now += 5
        leaving = rng.choice(list(selector.workers))
        if i % 50 == 0:
            selector.remove(leaving)
            instance += 1
            add_engine(selector, instance, clock, source(instance))
        for known in selector.workers.values():
            known.hear(load())
        prompt = [rng.randrange(10_000) for _ in range(40)]
        chosen = selector.select(prompt, MODEL).instance_id
        selector.index.apply(chosen, [stored(prompt)])
        selector.index.apply(chosen, [BlockRemoved(block_hashes(prompt, 4)[::-1])])
    assert sorted(selector.index._names) == sorted(selector.workers)
    assert selector.index._tree.dump_tree_as_events() == []
    assert all(len(known._prefixes) <= 30 for known in selector.workers.values())


def test_a_prediction_ends_with_the_event_that_it_was_of(clock: Clock) -> None:
    """What was stored and then evicted is not cached, though it was routed here a moment ago."""
    selector = fleet(clock)
    tokens = [*A, *B, *C]
    chosen = selector.select(tokens, MODEL).instance_id
    assert selector.select(tokens, MODEL).overlap_blocks == 3
    worker, hashes = selector.workers[chosen], block_hashes(tokens, 4)
    worker.settle(selector.index.apply(chosen, [stored(tokens)]))
    assert selector.select(tokens, MODEL).overlap_blocks == 3
    worker.settle(selector.index.apply(chosen, [BlockRemoved(hashes[:0:-1])]))
    found = {c.instance_id: c.overlap_blocks for c in selector.select(tokens, MODEL).candidates}
    assert found[chosen] == 1
