"""A decision with a policy, with one that fails, and with one in its shadow."""

import itertools
import logging
from types import SimpleNamespace

from chapter3.decision import PolicyInUse, candidates, decide, output, policy_state
from chapter3.snapshot import Score, Snapshot
from common.protocol_routing import PolicyState, ScoredCandidate
from tests.chapter3.fleet import FIRST, fixed, snapshot, view

import pytest

TWO = snapshot(view(0, running=5), view(1, running=1, overlap_blocks=3))


def broken(at: Snapshot) -> list[float]:
    raise RuntimeError("no idea")


def test_the_answer_has_the_choice_and_every_candidate() -> None:
    at = snapshot(
        view(0, running=2, waiting=1, prefill_tokens=7, used_blocks=9, overlap_blocks=3), view(1)
    )
    found = output(decide(at, fixed({"a": 1.0, "b": 2.0}, 0.5), fixed(4, 6)), queued_ms=1.5)
    assert (found.instance_id, found.worker_id) == (FIRST, 0)
    assert (found.overlap_blocks, found.overlap_tokens) == (3, 48)
    assert found.queued_ms == 1.5
    assert found.reason == "best of 2 by 2.5: a 1, b 2; 3 blocks cached"
    first, second = found.candidates
    assert first == ScoredCandidate(
        FIRST, 0, 3, 2, 1, 7, 9, score=3.0, terms={"a": 1.0, "b": 2.0}, shadow=4.0
    )
    assert (second.worker_id, second.score, second.shadow) == (1, 0.5, 6.0)
    assert found.error is None


def test_a_policy_that_fails_leaves_the_choice_to_the_load(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is told once, not a thousand times a second."""
    use = PolicyInUse("broken", broken)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            decision = decide(TWO, use)
            assert decision.worker.worker_id == 1
    assert decision.reason.startswith("broken failed, the least loaded instead: best of 2 by 4")
    assert (use.decisions, use.failures) == (3, 3)
    assert "RuntimeError('no idea')" in use.failure
    assert len(caplog.records) == 1
    state = policy_state(use, None)
    assert (state.failures, state.failure) == (3, use.failure)


def test_another_failure_is_told_again(caplog: pytest.LogCaptureFixture) -> None:
    errors = iter(["one", "one", "another"])

    def fickle(at: Snapshot) -> list[float]:
        raise RuntimeError(next(errors))

    use = PolicyInUse("fickle", fickle)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            decide(TWO, use)
    assert len(caplog.records) == 2


def test_failures_that_differ_each_time_do_not_fill_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fickle(at: Snapshot) -> list[float]:
        raise KeyError(use.decisions)

    use = PolicyInUse("fickle", fickle)
    with caplog.at_level(logging.WARNING):
        for _ in range(50):
            decide(TWO, use)
    assert use.failures == 50
    assert len(caplog.records) <= 10


def test_a_policy_that_holds_up_the_router_is_told_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.cycle([0.0, 1.0])
    clock = SimpleNamespace(perf_counter=lambda: next(ticks))
    monkeypatch.setattr("chapter3.decision.time", clock)
    use = fixed(1.0, 0.0)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            decide(TWO, use)
    assert [record.getMessage() for record in caplog.records] == [
        "policy fixed took 1000 ms; the router does nothing else meanwhile"
    ]


def test_a_policy_that_recovers_is_used_again() -> None:
    scores: list[list[Score]] = [[], [1.0, 0.0]]
    use = PolicyInUse("mine", lambda _: scores.pop(0))
    assert decide(TWO, use).worker.worker_id == 1
    assert decide(TWO, use).worker.worker_id == 0
    assert use.failures == 1


def test_the_shadow_never_routes_and_its_regret_is_in_its_own_score() -> None:
    """It would choose worker 1, which scores 10 more than 0; then it agrees."""
    use, shadow = fixed(1.0, 0.0), fixed(-5.0, 5.0)
    decision = decide(TWO, use, shadow)
    assert decision.worker.worker_id == 0
    assert [candidate.shadow for candidate in candidates(decision)] == [-5.0, 5.0]
    assert policy_state(use, shadow) == PolicyState(
        "fixed", "fixed", shadowed=1, disagreed=1, regret=10.0
    )
    agreeing = fixed(0.0, 7.0)
    assert decide(TWO, agreeing, shadow).worker.worker_id == 1
    state = policy_state(agreeing, shadow)
    assert (state.shadowed, state.disagreed, state.regret) == (2, 1, 5.0)


def test_the_shadow_breaks_ties_as_the_policy_does() -> None:
    """It would toss the same way: no disagreement, and nothing to regret."""
    at = snapshot(view(0, turn=2), view(1, turn=1))
    use, shadow = fixed(0, 0), fixed(3, 3)
    assert decide(at, use, shadow).worker.worker_id == 1
    state = policy_state(use, shadow)
    assert (state.disagreed, state.regret) == (0, 0.0)


def test_a_shadow_that_fails_harms_nobody() -> None:
    use, shadow = fixed(1.0, 0.0), PolicyInUse("broken", broken)
    decision = decide(TWO, use, shadow)
    assert decision.worker.worker_id == 0
    assert decision.shadow is None
    assert [candidate.shadow for candidate in candidates(decision)] == [None, None]
    state = policy_state(use, shadow)
    assert (state.failures, state.shadowed, state.regret) == (0, 0, 0.0)
    assert state.shadow_failures == 1
    assert "no idea" in state.shadow_failure


def test_the_shadow_sees_what_a_failing_policy_left_to_the_load() -> None:
    use, shadow = PolicyInUse("broken", broken), fixed(2.0, 0.5)
    assert decide(TWO, use, shadow).worker.worker_id == 1
    state = policy_state(use, shadow)
    assert (state.failures, state.shadowed, state.disagreed, state.regret) == (1, 1, 1, 1.5)


def test_with_no_decision_there_is_no_regret() -> None:
    assert policy_state(fixed(), fixed()) == PolicyState("fixed", "fixed")
    assert policy_state(fixed(), None) == PolicyState("fixed")
