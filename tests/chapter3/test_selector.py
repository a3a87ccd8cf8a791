"""Whole decisions in virtual time: what is cached, what is known of the load, who may run it."""

import random
from collections import Counter
from typing import Any

from chapter3.decision import PolicyInUse
from chapter3.selector import Selector
from chapter3.snapshot import Snapshot
from chapter3.worker_state import worker_state
from common.kv import BlockRemoved, block_hashes
from common.protocol import PipelineError
from tests.chapter3.fleet import (
    FIRST,
    MODEL,
    add_engine,
    fixed,
    fleet,
    load,
    route,
    source,
    stored,
)

import pytest

A, B, C, D = [1] * 4, [2] * 4, [3] * 4, [4] * 4
SECOND, THIRD = FIRST + 1, FIRST + 2


def recorded() -> tuple[PolicyInUse, list[Snapshot]]:
    """A policy that takes the first engine, and what it was shown."""
    shown: list[Snapshot] = []

    def policy(at: Snapshot) -> list[float]:
        shown.append(at)
        return [-float(position) for position in range(len(at.workers))]

    return PolicyInUse("recorded", policy), shown


def chosen(selector: Selector, tokens: list[int], now: float = 0.0, **fields: Any) -> int:
    return selector.select(route(tokens, **fields), now).worker.instance_id


def overlaps(selector: Selector, tokens: list[int], now: float = 0.0) -> dict[int, int]:
    decision = selector.select(route(tokens), now)
    return {view.instance_id: view.overlap_blocks for view in decision.snapshot.workers}


def test_the_policy_sees_every_engine() -> None:
    """Worker 0: 2 * 2/4 - 0.25 - 1/2. Worker 1: 2 * 0/4 - 0.5 - 2/2."""
    selector = fleet("kv")
    selector.index.apply(FIRST, [stored([*A, *B])])
    selector.workers[FIRST].hear(load(running=3, waiting=1, used_blocks=25), 0.0)
    selector.workers[SECOND].hear(load(running=3, waiting=2, used_blocks=50), 0.0)
    decision = selector.select(route([*A, *B, *C, *D]), 0.0)
    assert decision.worker.instance_id == FIRST
    assert [score.total for score in decision.scores] == [0.25, -1.5]
    first, second = decision.snapshot.workers
    assert (first.overlap_blocks, first.cached_blocks, first.prompt_blocks) == (2, 2, 4.0)
    assert (second.overlap_blocks, second.cached_blocks, second.running) == (0, 0, 3)


def test_the_policy_sees_the_request() -> None:
    use, shown = recorded()
    selector = fleet(use)
    hints = {"session": "s", "tenant": "t", "priority": 3, "output_tokens": 40}
    selector.select(route([*A, 1], hints=hints, max_tokens=100), 12.5)
    (at,) = shown
    request = at.request
    assert (request.prompt_tokens, request.output_tokens) == (5, 40)
    assert (request.session, request.tenant, request.priority) == ("s", "t", 3)
    assert at.now == 12.5


def test_the_expected_length_is_the_hint_or_the_mean_and_at_most_what_was_asked_for() -> None:
    use, shown = recorded()
    selector = fleet(use)
    for _ in range(200):
        selector.finished(20)
    for fields in (
        {},
        {"max_tokens": 5},
        {"max_tokens": 500},
        {"hints": {"output_tokens": 300}},
        {"hints": {"output_tokens": 300}, "max_tokens": 7},
        {"hints": {"output_tokens": 0}},
    ):
        selector.select(route(A, **fields), 0.0)
    expected = [at.request.output_tokens for at in shown]
    assert expected == pytest.approx([20, 5, 20, 300, 7, 0], abs=0.1)


def test_what_is_routed_is_active_until_it_is_reported() -> None:
    use, shown = recorded()
    selector = fleet(use)
    selector.index.apply(FIRST, [stored(A)])
    tokens = [*A, *B, *C, 9]
    selector.select(route(tokens, "r0/0", hints={"output_tokens": 8}), 0.0)
    selector.select(route(tokens, "r1/0"), 0.0)
    (view, _) = shown[-1].workers
    # 13 tokens of which 4 are cached; 3 full blocks, 1 in part, and 2 for 8 tokens of output.
    assert (view.prefill_tokens, view.prefill_requests, view.active_blocks) == (9, 1, 6)
    assert (view.active_prompt_blocks, view.new_prompt_blocks) == (3, 0)
    for request_id in ("r0/0", "r1/0"):
        selector.active.first_token(request_id, 1.0)
        selector.active.finish(request_id)
    selector.select(route(tokens), 2.0)
    (view, _) = shown[-1].workers
    assert (view.prefill_tokens, view.prefill_requests, view.active_blocks) == (0, 0, 0)


def test_a_request_without_an_id_is_not_counted_as_active() -> None:
    """Nobody could report its end."""
    selector = fleet()
    selector.select(route([*A, *B]), 0.0)
    assert not selector.active.requests


def test_a_seed_is_new_each_time_and_follows_the_generator() -> None:
    def seeds(number: int) -> list[int]:
        use, shown = recorded()
        selector = fleet(use)
        selector.rng = random.Random(number)
        for _ in range(50):
            selector.select(route(A), 0.0)
        return [at.seed for at in shown]

    assert seeds(1) == seeds(1) != seeds(2)
    assert len(set(seeds(1))) == 50


def test_equal_prompts_follow_the_first_before_any_event_comes() -> None:
    selector = fleet("kv", engines=4)
    first = selector.select(route([*A, *B, 1]), 0.0).worker
    assert first.overlap_blocks == 0
    for _ in range(5):
        again = selector.select(route([*A, *B, 2]), 0.0).worker
        assert (again.instance_id, again.overlap_blocks) == (first.instance_id, 2)
    for known in selector.workers.values():
        known.hear(load(), 10.1)
    assert set(overlaps(selector, [*A, *B, 2], 10.1).values()) == {0}


def test_events_take_over_from_the_prediction() -> None:
    selector = fleet("kv")
    tokens = [*A, *B]
    instance = chosen(selector, tokens)
    selector.index.apply(instance, [stored(tokens)])
    for known in selector.workers.values():
        known.hear(load(), 10.1)
    assert overlaps(selector, tokens, 10.1)[instance] == 2
    worker, hashes = selector.workers[instance], block_hashes(tokens, 4)
    worker.settle(selector.index.apply(instance, [BlockRemoved(hashes[::-1])]))
    assert overlaps(selector, tokens, 10.1)[instance] == 0


def test_a_prediction_ends_with_the_event_that_it_was_of() -> None:
    """What was stored and then evicted is not cached, though it was routed here a moment ago."""
    selector = fleet("kv")
    tokens = [*A, *B, *C]
    instance = chosen(selector, tokens)
    assert overlaps(selector, tokens)[instance] == 3
    worker, hashes = selector.workers[instance], block_hashes(tokens, 4)
    worker.settle(selector.index.apply(instance, [stored(tokens)]))
    assert overlaps(selector, tokens)[instance] == 3
    worker.settle(selector.index.apply(instance, [BlockRemoved(hashes[:0:-1])]))
    assert overlaps(selector, tokens)[instance] == 1


@pytest.mark.parametrize("policy", ["kv", "least_loaded", "round_robin", "dynamo"])
def test_a_burst_of_different_prompts_is_spread_evenly(policy: str) -> None:
    """No engine's figures change in between: what was just routed must count."""
    selector = fleet(policy, engines=3)
    counts: Counter[int] = Counter()
    for number in range(99):
        counts[chosen(selector, [100 + number] * 9, request_id=f"r{number}/0")] += 1
        assert max(counts.values()) - min(counts[FIRST + i] for i in range(3)) <= 1
    assert set(counts.values()) == {33}


def test_round_robin_goes_on_when_engines_come_and_leave() -> None:
    selector = fleet("round_robin", engines=2)

    def next_() -> int:
        return chosen(selector, A)

    assert [next_() for _ in range(3)] == [FIRST, SECOND, FIRST]
    add_engine(selector, THIRD, source(2))
    assert [next_() for _ in range(4)] == [THIRD, SECOND, FIRST, THIRD]
    selector.remove(SECOND)
    assert [next_() for _ in range(3)] == [FIRST, THIRD, FIRST]


def test_a_failed_engine_is_left_out_with_all_that_it_had() -> None:
    selector = fleet("kv")
    selector.index.apply(FIRST, [stored([*A, *B])])
    assert chosen(selector, [*A, *B], request_id="r0/0") == FIRST
    selector.fail(FIRST)
    assert selector.index.block_count(FIRST) == 0
    assert not selector.active.requests
    for _ in range(3):
        assert list(overlaps(selector, [*A, *B])) == [SECOND]
    selector.fail(999)  # has left meanwhile


def test_an_engine_that_left_is_gone() -> None:
    selector = fleet("kv")
    selector.index.apply(FIRST, [stored(A)])
    selector.remove(FIRST)
    selector.remove(FIRST)
    assert list(selector.workers) == [SECOND]
    assert selector.index.block_count(FIRST) == 0
    assert overlaps(selector, A) == {SECOND: 0}


def test_silent_engines_are_chosen_only_if_there_is_no_other() -> None:
    selector = fleet("kv")
    selector.index.apply(FIRST, [stored([*A, *B])])
    selector.workers[SECOND].hear(load(running=50, waiting=9, used_blocks=100), 3.1)
    assert chosen(selector, [*A, *B], 3.1) == SECOND
    assert overlaps(selector, [*A, *B], 6.2).keys() == {FIRST, SECOND}
    assert chosen(selector, [*A, *B], 6.2) == FIRST


def test_an_excluded_engine_is_not_a_candidate() -> None:
    selector = fleet("kv")
    selector.index.apply(FIRST, [stored(A)])
    decision = selector.select(route(A), 0.0, excluded=[FIRST, 999])
    assert [view.instance_id for view in decision.snapshot.workers] == [SECOND]


def test_only_engines_with_the_model_are_candidates() -> None:
    selector = fleet("kv", engines=1)
    add_engine(selector, SECOND, source(1, model="another"))
    for model, instance in ((MODEL, FIRST), ("another", SECOND)):
        for _ in range(3):
            decision = selector.select(route(A, model=model), 0.0)
            assert [view.instance_id for view in decision.snapshot.workers] == [instance]


def test_the_error_says_what_became_of_every_engine() -> None:
    selector = Selector(PolicyInUse.named("kv"))
    with pytest.raises(PipelineError) as raised:
        chosen(selector, A)
    assert raised.value.info.kind == "unavailable"
    none = "No engine with the model a-model is ready (there is none at all)."
    assert raised.value.info.message == none
    add_engine(selector, FIRST, source(0)).synced = False
    add_engine(selector, SECOND, source(1, model="another"))
    add_engine(selector, THIRD, source(2))
    selector.fail(THIRD)
    with pytest.raises(PipelineError) as raised:
        chosen(selector, A)
    assert raised.value.info.message == (
        "No engine with the model a-model is ready (worker 0 with a-model is starting, "
        "worker 1 with another is ready, worker 2 with a-model is failed)."
    )


def test_the_error_says_which_engines_the_request_was_not_to_have() -> None:
    selector = fleet("kv", engines=1)
    with pytest.raises(PipelineError) as raised:
        selector.select(route(A), 0.0, excluded=[FIRST])
    assert raised.value.info.message == (
        "No engine with the model a-model is ready (worker 0 with a-model is excluded)."
    )


def test_a_request_that_was_refused_counts_nowhere() -> None:
    selector = fleet("kv")
    with pytest.raises(PipelineError):
        chosen(selector, A, model="another", request_id="r0/0")
    assert not selector.active.requests
    assert [view.running for view in selector.select(route(A), 0.0).snapshot.workers] == [0, 0]


def test_a_policy_that_fails_counts_its_choice_like_any_other() -> None:
    selector = fleet(fixed(), engines=3)
    counts = Counter(chosen(selector, [n] * 9, request_id=f"{n}/0") for n in range(9))
    assert set(counts.values()) == {3}
    assert len(selector.active.requests) == 9
    assert selector.policy.failures == 9


def test_engines_of_two_block_sizes_are_compared_by_tokens() -> None:
    """Of 16 tokens one has cached 12 in three blocks of 4, the other 8 in a block of 8."""
    selector = fleet("kv", engines=1)
    add_engine(selector, SECOND, source(1, block_size=8)).hear(load(), 0.0)
    tokens = [*A, *B, *C, *D]
    selector.index.apply(FIRST, [stored([*A, *B, *C])])
    selector.index.apply(SECOND, [stored([*A, *B], 8)])
    decision = selector.select(route(tokens, "r0/0"), 0.0)
    assert decision.worker.instance_id == FIRST
    assert [view.overlap_blocks for view in decision.snapshot.workers] == [3, 1]
    assert [view.new_tokens for view in decision.snapshot.workers] == [4, 8]
    assert [score.total for score in decision.scores] == [1.5, 1.0]
    selector.index.remove(SECOND)
    selector.index.apply(SECOND, [stored(tokens, 8)])
    other = selector.select(route(tokens, "r1/0"), 0.0, excluded=[FIRST]).worker
    assert (other.instance_id, other.overlap_blocks, other.new_tokens) == (SECOND, 2, 0)
    assert selector.active.load(SECOND).prompt_blocks == 2


@pytest.mark.parametrize("tokens", [[], [1, 2, 3]])
def test_a_prompt_shorter_than_a_block_goes_by_load(tokens: list[int]) -> None:
    selector = fleet("kv")
    selector.workers[FIRST].hear(load(used_blocks=10), 0.0)
    decision = selector.select(route(tokens, "r0/0"), 0.0)
    assert (decision.worker.instance_id, decision.worker.overlap_blocks) == (SECOND, 0)
    assert [score.total for score in decision.scores] == [-0.1, 0.0]


def test_the_state_is_what_the_router_believes() -> None:
    selector = fleet("kv", engines=1)
    known = selector.workers[FIRST]
    selector.index.apply(FIRST, [stored([*A, *B])])
    state = worker_state(selector, known, selector.index.blocks()[FIRST], 0.0)
    assert (state.instance_id, state.worker_id, state.model) == (FIRST, 0, MODEL)
    assert (state.state, state.blocks, state.metrics) == ("ready", 2, load())
    assert state.block_hashes == block_hashes([*A, *B], 4)
    assert worker_state(selector, known, [], 3.1).state == "silent"
    selector.fail(FIRST)
    state = worker_state(selector, known, [], 3.1)
    assert (state.state, state.blocks, state.metrics) == ("failed", 0, None)
    known.synced, known.failed = False, False
    assert worker_state(selector, known, [], 3.1).state == "starting"


def test_decisions_of_a_week_leave_nothing_behind() -> None:
    """Prompts, engines and their blocks come and go; what is kept is of the last minutes."""
    selector, rng = fleet("dynamo", engines=4), random.Random(0)
    instance, now = 200, 0.0
    for number in range(3000):
        now += 5
        leaving = rng.choice(list(selector.workers))
        if number % 50 == 0:
            selector.remove(leaving)
            instance += 1
            add_engine(selector, instance, source(instance), now)
        for known in selector.workers.values():
            known.hear(load(), now)
        prompt = [rng.randrange(10_000) for _ in range(40)]
        target = chosen(selector, prompt, now, request_id=f"r{number}/0")
        selector.index.apply(target, [stored(prompt)])
        selector.index.apply(target, [BlockRemoved(block_hashes(prompt, 4)[::-1])])
        if rng.random() < 0.9:  # of the others nobody tells the end
            selector.active.finish(f"r{number}/0")
    assert sorted(selector.index._names) == sorted(selector.workers)
    assert selector.index._tree.dump_tree_as_events() == []
    assert all(len(known._prefixes) <= 30 for known in selector.workers.values())
    assert len(selector.active.requests) < 60
    assert set(selector.active._loads) <= set(selector.workers)
