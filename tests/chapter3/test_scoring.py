"""What a policy may return, what is refused, and who wins."""

import itertools
import math
import sys
from decimal import Decimal
from fractions import Fraction
from typing import Any

from chapter3.scoring import PolicyError, Scored, best, reason, scored
from chapter3.snapshot import Snapshot
from tests.chapter3.fleet import snapshot, view

import numpy as np
import pytest

TWO = snapshot(view(0), view(1))


def scores_of(returned: Any, at: Snapshot = TWO) -> list[Scored]:
    return scored(lambda _: returned, at)


def refused(returned: Any) -> str:
    with pytest.raises(PolicyError) as raised:
        scores_of(returned)
    return str(raised.value)


@pytest.mark.parametrize(
    "returned",
    [
        [1, 0.5],
        (1.0, 0.5),
        iter([1.0, 0.5]),
        np.array([1.0, 0.5], dtype=np.float32),
        [Fraction(1), np.float16(0.5)],
        [True, Fraction(1, 2)],
        [{"a": 0.75, "b": 0.25}, {"a": 1, "b": -0.5}],
        [{"a": np.float32(1)}, 0.5],
    ],
)
def test_numbers_and_terms_are_scores(returned: Any) -> None:
    found = scores_of(returned)
    assert [score.total for score in found] == [1.0, 0.5]
    assert [math.fsum(score.terms.values()) for score in found] == [1.0, 0.5]


def test_terms_keep_their_names_and_a_number_is_one_term() -> None:
    named, plain = scores_of([{"prefill": -2, "decode": -0.5}, 3])
    assert named == Scored(-2.5, {"prefill": -2.0, "decode": -0.5})
    assert plain == Scored(3.0, {"score": 3.0})


def test_terms_of_very_different_size_add_up_exactly() -> None:
    (score, _) = scores_of([{"a": 1e16, "b": 1.0, "c": -1e16}, 0])
    assert score.total == 1.0


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "the policy returned 1 scores for 2 workers"),
        ([1.0, 2.0, 3.0], "the policy returned more than 2 scores for 2 workers"),
        (itertools.repeat(1.0), "the policy returned more than 2 scores for 2 workers"),
        ([], "the policy returned 0 scores for 2 workers"),
        (None, "NoneType"),
        (1.0, "float"),
        ([1.0, None], "None is no number"),
        ([1.0, math.nan], "is no score"),
        ([1.0, -math.inf], "is no score"),
        ([1.0, {"a": math.inf, "b": -math.inf}], "inf"),
        ([1.0, {"a": 1e308, "b": 1e308}], "overflow"),
        ([1.0, 10**400], "too large"),
        ([1.0, {"a": math.nan}], "is no score"),
        ([1.0, [2.0]], "is no number"),
        ([1.0, "2.0"], "'2.0' is no number"),
        ([1.0, {"a": "2"}], "'2' is no number"),
        ([1.0, 1j], "1j is no number"),
        ([1.0, Decimal(1)], "is no number"),
        ("12", "'1' is no number"),
        ({101: 1.0, 102: 2.0}, "a dict is no list of scores in workers' order"),
        ({1.0, 2.0}, "a set is no list of scores in workers' order"),
    ],
)
def test_what_are_no_scores_is_the_policys_fault(returned: Any, message: str) -> None:
    assert message in refused(returned)


def test_an_exception_is_told_with_its_place() -> None:
    def broken(at: Snapshot) -> list[float]:
        return [1 / worker.running for worker in at.workers]

    with pytest.raises(PolicyError) as raised:
        scored(broken, TWO)
    line = broken.__code__.co_firstlineno + 1
    assert str(raised.value) == (
        f"the policy failed: ZeroDivisionError('division by zero') ({__file__}, line {line})"
    )


def test_a_long_message_is_cut() -> None:
    def broken(at: Snapshot) -> list[float]:
        raise ValueError("x" * 10_000)

    with pytest.raises(PolicyError) as raised:
        scored(broken, TWO)
    assert len(str(raised.value)) < 1000


def test_an_exception_of_a_generator_is_the_policys_fault() -> None:
    assert "ZeroDivisionError" in refused(1 / running for running in (1, 0))


def test_a_policy_cannot_end_the_router() -> None:
    with pytest.raises(PolicyError, match="SystemExit"):
        scored(lambda _: sys.exit(1), TWO)


def test_a_policy_cannot_change_what_it_sees() -> None:
    def cheat(at: Snapshot) -> list[float]:
        at.workers[0].running = 9  # type: ignore[misc]
        return [0.0, 0.0]

    with pytest.raises(PolicyError, match="cannot assign to field 'running'"):
        scored(cheat, TWO)


@pytest.mark.parametrize(
    ("totals", "turns", "winner"),
    [
        ([1.0, 2.0, 3.0], [0, 0, 9], 2),
        ([-3.0, -1.0, -2.0], [0, 9, 0], 1),
        ([1.0, 1.0, 1.0], [3, 1, 2], 1),  # of equal ones, who was chosen longest ago
        ([1.0, 2.0, 2.0], [0, 2, 1], 2),
        ([0.0, 0.0, 0.0], [0, 0, 0], 0),  # nobody was chosen yet
        ([0.0, -0.0, 0.0], [2, 1, 3], 1),
    ],
)
def test_the_highest_score_wins(totals: list[float], turns: list[int], winner: int) -> None:
    at = snapshot(*[view(number, turn=turn) for number, turn in enumerate(turns)])
    assert best(scores_of(totals, at), at) == winner


def test_the_reason_has_the_margin_and_the_terms() -> None:
    at = snapshot(view(0), view(1, overlap_blocks=4), view(2))
    scores = scores_of([-3, {"prefill": -1.5, "decode": -0.25}, -2], at)
    assert reason(scores, at, 1) == (
        "best of 3 by 0.25: prefill -1.5, decode -0.25; 4 blocks cached"
    )


def test_the_reason_of_the_only_engine_has_no_margin() -> None:
    at = snapshot(view(0))
    assert reason(scores_of([2.0], at), at, 0) == "best of 1: score 2; 0 blocks cached"
    assert reason(scores_of([{}], at), at, 0) == "best of 1: 0.0; 0 blocks cached"
