"""The built-in policies, with scores worked out by hand; for Dynamo's see `test_policy_dynamo`."""

from collections import Counter

from chapter3.policies import (
    earliest_start,
    kv,
    least_loaded,
    power_of_two,
    random_choice,
    round_robin,
    session_affinity,
)
from chapter3.policy_loader import POLICIES, load_policy
from chapter3.scoring import best, scored
from chapter3.snapshot import Policy, Snapshot
from tests.chapter3.fleet import snapshot, view

import pytest


def winner(policy: Policy, at: Snapshot) -> int:
    return at.workers[best(scored(policy, at), at)].worker_id


def test_kv_is_the_score_of_chapter_2() -> None:
    """2 * 5/10 - 25/100 - 1/2; 2 * 0/10 - 50/100 - 2/2; and nobody waits at the last one."""
    at = snapshot(
        view(0, overlap_blocks=5, used_blocks=25, total_blocks=100, waiting=1),
        view(1, overlap_blocks=0, used_blocks=50, total_blocks=100, waiting=2),
        view(2, overlap_blocks=2, used_blocks=100, total_blocks=100),
    )
    assert kv.policy(at) == [
        {"overlap": 1.0, "KV usage": -0.25, "waiting": -0.5},
        {"overlap": 0.0, "KV usage": -0.5, "waiting": -1.0},
        {"overlap": 0.4, "KV usage": -1.0, "waiting": 0.0},
    ]
    assert winner(kv.policy, at) == 0


def test_kv_does_without_queues() -> None:
    assert kv.policy(snapshot(view(0)))[0]["waiting"] == 0.0


def test_least_loaded_counts_those_that_run_and_those_that_wait() -> None:
    at = snapshot(view(0, running=4), view(1, running=2, waiting=1), view(2, running=1, waiting=3))
    assert [score.total for score in scored(least_loaded.policy, at)] == [-4.0, -3.0, -4.0]
    assert winner(least_loaded.policy, at) == 1


def test_round_robin_takes_who_had_no_turn_for_longest() -> None:
    assert (
        winner(round_robin.policy, snapshot(view(0, turn=7), view(1, turn=3), view(2, turn=5))) == 1
    )


def test_random_gives_all_the_same_share() -> None:
    at = [snapshot(*map(view, range(4)), seed=seed) for seed in range(4000)]
    counts = Counter(winner(random_choice.policy, one) for one in at)
    assert all(abs(counts[number] - 1000) < 150 for number in range(4))
    assert random_choice.policy(at[0]) == random_choice.policy(at[0])


def test_power_of_two_compares_two_and_only_two() -> None:
    """Of loads 0 to 3 the least is in half of all pairs, and the most never wins."""
    workers = [view(number, running=number) for number in range(4)]
    counts = Counter(
        winner(power_of_two.policy, snapshot(*workers, seed=seed)) for seed in range(6000)
    )
    for number, share in enumerate([1 / 2, 1 / 3, 1 / 6, 0]):
        assert counts[number] / 6000 == pytest.approx(share, abs=0.04)


def test_power_of_two_does_with_one_engine() -> None:
    assert winner(power_of_two.policy, snapshot(view(0, running=9))) == 0


def test_a_session_stays_where_it_is_and_few_move_when_an_engine_leaves() -> None:
    sessions = [f"session {number}" for number in range(1000)]

    def engines_of(*workers: int) -> list[int]:
        return [
            winner(session_affinity.policy, snapshot(*map(view, workers), session=session))
            for session in sessions
        ]

    before, after = engines_of(0, 1, 2, 3), engines_of(0, 1, 3)
    assert all(abs(before.count(number) - 250) < 60 for number in range(4))
    for old, new in zip(before, after, strict=True):
        assert new == old or old == 2
    assert engines_of(3, 1, 0, 2) == before, "the order of the engines is nothing"


def test_a_request_without_a_session_goes_by_load() -> None:
    at = snapshot(view(0, running=2), view(1, running=1, waiting=2), view(2, running=1))
    assert session_affinity.policy(at) == [{"load": -2.0}, {"load": -3.0}, {"load": -1.0}]


def test_earliest_start_is_the_delay_to_this_request_and_to_others() -> None:
    """160 tokens, of which 96 are cached at the second, at 100 tokens a second."""
    at = snapshot(
        view(0, prefill_s=0.5, prefill_tokens_per_s=100.0),
        view(1, prefill_s=1.0, overlap_blocks=6, prefill_tokens_per_s=100.0, running=4, waiting=1),
    )
    (first, second) = scored(earliest_start.policy, at)
    assert first.terms == pytest.approx(
        {"place": 0.0, "queue": -0.5, "prefill": -1.6, "others": -1.6}
    )
    assert second.terms == pytest.approx(
        {"place": 0.0, "queue": -1.0, "prefill": -0.64, "others": -0.64 * 1.5}
    )


def test_earliest_start_counts_the_wait_for_a_place() -> None:
    """Eight run at once, answers take 4 s: one ends every half second."""
    at = snapshot(
        view(0, running=8, waiting=2, max_running=8, answer_s=4.0),
        view(1, running=8, max_running=8, answer_s=4.0),
        view(2, running=7, max_running=8, answer_s=4.0),
        view(3, running=4, waiting=1, answer_s=4.0),
    )
    places = [score.terms["place"] for score in scored(earliest_start.policy, at)]
    assert places == pytest.approx([-1.5, -0.5, 0.0, -1.0])


def test_a_long_prompt_keeps_out_of_the_way() -> None:
    at = snapshot(view(0, running=2), view(1, running=1), view(2, running=3))
    assert winner(earliest_start.policy, at) == 1


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_takes_what_is_extreme(name: str) -> None:
    """One engine, an empty and a huge prompt, an engine that is full, and an idle one."""
    policy = load_policy(name)
    idle = view(0, prompt_blocks=1 / 16)
    full = view(
        1,
        prompt_blocks=1e6,
        overlap_blocks=10**6,
        running=10**4,
        waiting=10**5,
        used_blocks=10**6,
        total_blocks=10**6,
        prefill_tokens=10**9,
        prefill_s=1e6,
    )
    for workers in ([idle], [full], [idle, full]):
        for session in ("", "someone"):
            assert len(scored(policy, snapshot(*workers, session=session))) == len(workers)


AWARE_OF_LOAD = ["dynamo", "earliest_start", "kv", "least_loaded", "power_of_two"]
AWARE_OF_CACHES = ["dynamo", "earliest_start", "kv"]


@pytest.mark.parametrize("name", AWARE_OF_LOAD)
def test_policies_that_know_of_load_avoid_it(name: str) -> None:
    busy = view(
        0,
        running=8,
        waiting=3,
        used_blocks=90,
        total_blocks=100,
        prefill_tokens=4000,
        prefill_requests=3,
        prefill_s=0.5,
        decode_requests=5,
        active_blocks=90,
        active_prompt_blocks=90,
    )
    assert winner(load_policy(name), snapshot(busy, view(1, total_blocks=100))) == 1


@pytest.mark.parametrize("name", AWARE_OF_CACHES)
def test_policies_that_know_of_caches_follow_them(name: str) -> None:
    assert winner(load_policy(name), snapshot(view(0), view(1, overlap_blocks=8), view(2))) == 1
