"""The decision as pure functions, with numbers worked out by hand."""

import random
from collections import Counter
from typing import get_args

from chapter2.policy import choose, kv_score
from common.protocol_router import Candidate, Policy

import pytest


def engine(
    worker_id: int,
    *,
    overlap: int = 0,
    usage: float = 0.0,
    running: int = 0,
    waiting: int = 0,
) -> Candidate:
    return Candidate(100 + worker_id, worker_id, overlap, usage, running, waiting)


def decide(
    policy: Policy,
    candidates: list[Candidate],
    *,
    length: float = 4.0,
    turns: list[int] | None = None,
    seed: int = 0,
) -> tuple[int, str]:
    """The worker that gets a prompt of `length` blocks, and the reason."""
    best, reason = choose(
        policy,
        candidates,
        [length] * len(candidates),
        turns or [0] * len(candidates),
        random.Random(seed),
    )
    return best.worker_id, reason


@pytest.mark.parametrize(
    ("overlap", "kv_usage", "waiting", "max_waiting", "score"),
    [
        (0.0, 0.0, 0, 0, 0.0),  # idle and empty, nobody waits anywhere
        (1.0, 0.0, 0, 0, 2.0),  # the best there is
        (0.0, 1.0, 4, 4, -2.0),  # the worst there is
        (1.0, 1.0, 4, 4, 0.0),  # all of it cached, but full: as good as idle and empty
        (0.5, 0.25, 0, 0, 0.75),
        (0.5, 0.25, 0, 4, 0.75),  # others' queues cost this one nothing
        (0.5, 0.25, 2, 4, 0.25),
        (0.75, 0.5, 1, 4, 0.75),
        (0.25, 0.125, 3, 8, 0.0),
    ],
)
def test_the_score_is_that_of_the_formula(
    overlap: float, kv_usage: float, waiting: int, max_waiting: int, score: float
) -> None:
    assert kv_score(overlap, kv_usage, waiting, max_waiting) == score


@pytest.mark.parametrize(
    ("candidates", "length", "scores", "best"),
    [
        # 2 * 4/4 - 0.875 - 8/8 = 0.125 beats an idle engine with nothing.
        ([engine(0, overlap=4, usage=0.875, waiting=8), engine(1)], 4.0, [0.125, 0.0], 0),
        # One block less and it no longer does: 2 * 3/4 - 0.875 - 8/8 = -0.375.
        ([engine(0, overlap=3, usage=0.875, waiting=8), engine(1)], 4.0, [-0.375, 0.0], 1),
        # 2 * 1/4 - 0.5 - 0 = 0 against 2 * 0 - 0.25 = -0.25: a quarter of a prompt is worth half
        # a cache.
        ([engine(0, usage=0.25), engine(1, overlap=1, usage=0.5)], 4.0, [-0.25, 0.0], 1),
        # The queue is relative to the fullest one: 2/4 and 4/4, and 1/1 if one waits at all.
        ([engine(0, waiting=2), engine(1, waiting=4)], 4.0, [-0.5, -1.0], 0),
        ([engine(0, overlap=2, waiting=1), engine(1, usage=0.5)], 4.0, [0.0, -0.5], 0),
        # Nobody waits: the term is 0, not 0/0.
        ([engine(0, usage=0.5), engine(1, usage=0.25)], 4.0, [-0.5, -0.25], 1),
        # A prompt of 10 tokens is 2.5 blocks of 4; the 2 full ones are 0.8 of it.
        ([engine(0), engine(1, overlap=2)], 2.5, [0.0, 1.6], 1),
        # Running requests count only by the blocks that they hold.
        ([engine(0, running=50), engine(1, usage=0.01)], 4.0, [0.0, -0.01], 0),
    ],
)
def test_golden_decisions_of_the_kv_policy(
    candidates: list[Candidate], length: float, scores: list[float], best: int
) -> None:
    for turns in ([0, 1], [1, 0]):  # whose turn it is does not matter where scores differ
        assert decide("kv", candidates, length=length, turns=turns)[0] == best
        assert [candidate.score for candidate in candidates] == pytest.approx(scores)


def test_prompts_are_as_long_as_each_engines_blocks_make_them() -> None:
    """32 tokens: half of it is one block of 16 here and two blocks of 8 there."""
    candidates = [engine(0, overlap=1), engine(1, overlap=2)]
    choose("kv", candidates, [32 / 16, 32 / 8], [0, 0], random.Random(0))
    assert [candidate.score for candidate in candidates] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("candidates", "scores", "best"),
    [
        ([engine(0, running=2, waiting=1), engine(1, running=2)], [-3, -2], 1),
        ([engine(0, running=1), engine(1, waiting=2)], [-1, -2], 0),
        # Neither what is cached nor how full the cache is counts.
        ([engine(0, running=1, overlap=4), engine(1, usage=1.0)], [-1, 0], 1),
    ],
)
def test_least_loaded_counts_running_and_waiting_requests(
    candidates: list[Candidate], scores: list[float], best: int
) -> None:
    assert decide("least_loaded", candidates)[0] == best
    assert [candidate.score for candidate in candidates] == scores


def test_round_robin_takes_who_waited_longest_whatever_the_load() -> None:
    candidates = [engine(0), engine(1, overlap=4), engine(2, running=9, waiting=9, usage=1.0)]
    assert decide("round_robin", candidates, turns=[7, 9, 3]) == (2, "its turn among 3")
    assert decide("round_robin", candidates, turns=[7, 9, 10])[0] == 0
    assert [candidate.score for candidate in candidates] == [None] * 3


def test_random_follows_its_seed_and_reaches_everyone_evenly() -> None:
    candidates = [engine(i, running=i) for i in range(4)]

    def picks(seed: int) -> list[int]:
        rng = random.Random(seed)
        return [
            choose("random", candidates, [4.0] * 4, [0] * 4, rng)[0].worker_id for _ in range(2000)
        ]

    assert picks(1) == picks(1) != picks(2)
    counts = Counter(picks(3))
    assert all(400 < counts[i] < 600 for i in range(4))


@pytest.mark.parametrize("policy", ["kv", "least_loaded", "round_robin"])
@pytest.mark.parametrize("engines", [1, 2, 3, 7])
def test_equal_engines_get_equal_shares(policy: Policy, engines: int) -> None:
    """At any moment no engine is more than one request ahead of another."""
    candidates = [engine(i, overlap=1, usage=0.1, running=2, waiting=1) for i in range(engines)]
    turns, counts, order = [0] * engines, [0] * engines, list[int]()
    for turn in range(1, 101):
        chosen, _ = decide(policy, candidates, turns=turns)
        turns[chosen] = turn
        counts[chosen] += 1
        order.append(chosen)
        assert max(counts) - min(counts) <= 1
    assert order[:engines] == list(range(engines))
    assert order[engines : 2 * engines] == order[:engines]


def test_only_the_equal_best_take_turns() -> None:
    candidates = [engine(0, overlap=1), engine(1), engine(2, overlap=1)]
    assert decide("kv", candidates, turns=[5, 0, 4])[0] == 2
    assert decide("kv", candidates, turns=[5, 0, 6])[0] == 0


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ("kv", "best score of 2: 3 blocks cached, 25% of the KV cache in use, 1 waiting"),
        ("least_loaded", "least loaded of 2: 2 running, 1 waiting"),
        ("round_robin", "its turn among 2"),
        ("random", "random among 2"),
    ],
)
def test_the_reason_says_what_decided(policy: Policy, reason: str) -> None:
    best = engine(0, overlap=3, usage=0.25, running=2, waiting=1)
    other = engine(1, usage=0.5, running=4, waiting=1)
    seed = next(seed for seed in range(99) if random.Random(seed).choice([True, False]))
    assert decide(policy, [best, other], seed=seed) == (0, reason)


def test_the_reason_tells_of_a_tie() -> None:
    _, reason = decide("kv", [engine(0), engine(1), engine(2, usage=0.5)])
    assert reason.startswith("best score of 3, 2 are equal and it is its turn: 0 blocks cached")


@pytest.mark.parametrize("policy", get_args(Policy))
def test_every_policy_takes_the_only_engine(policy: Policy) -> None:
    assert decide(policy, [engine(4, usage=1.0, waiting=300)])[0] == 4
