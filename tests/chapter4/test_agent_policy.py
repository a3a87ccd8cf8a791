"""The policy `agent`, with scores worked out by hand, and what the router counts for it."""

import zlib
from typing import Any

from chapter4.agent_hints import MAX_RETAIN_S, pool_of, retain_s, wanted_pool
from chapter4.canary import figures
from chapter4.disaggregation import PrefillRule
from chapter4.policies import agent, earliest_start
from chapter4.policy_loader import DEFAULT_POLICY
from chapter4.scoring import best, scored
from chapter4.selector import Selector
from chapter4.snapshot import Snapshot
from common.protocol_routing import RequestReport, RoutingHints
from tests.chapter4.fleet import FIRST, fleet, route, snapshot, view

import pytest


def winner(at: Snapshot) -> int:
    return at.workers[best(scored(agent.policy, at), at)].worker_id


def term(name: str, at: Snapshot) -> list[float]:
    return [scores[name] for scores in agent.policy(at)]


def test_it_is_chapter_4s_default() -> None:
    assert DEFAULT_POLICY == "agent"


def test_without_agents_it_is_earliest_start() -> None:
    at = snapshot(view(0, running=3, waiting=1, answer_s=2.0), view(1, overlap_blocks=4, running=1))
    plain = [sum(terms.values()) for terms in earliest_start.policy(at)]
    assert [score.total for score in scored(agent.policy, at)] == pytest.approx(plain)


def test_a_session_goes_back_unless_to_wait_takes_longer_than_to_compute() -> None:
    """Nine blocks take 9 s, and cost the fleet as much: worth to wait for 18 s and a little."""

    def at(queue_s: float) -> Snapshot:
        home = view(0, overlap_blocks=9, prefill_s=queue_s)
        return snapshot(home, view(1), step=3, returning=True, session="a")

    assert winner(at(17.0)) == 0
    assert winner(at(19.0)) == 1


def test_a_new_conversation_leaves_the_place_to_who_is_expected() -> None:
    full = {"running": 1, "max_running": 2, "answer_s": 4.0}
    at = snapshot(view(0, awaited=2, **full), view(1, **full))
    # Half of two sessions: one answer's time for their place, and 10 s of prefill in their way.
    assert term("awaited", at) == [-(4.0 + 10.0), 0.0]
    assert winner(at) == 1


def test_who_is_expected_does_not_wait_for_himself() -> None:
    at = snapshot(view(0, awaited=2, overlap_blocks=9), view(1), returning=True, step=2)
    assert term("awaited", at) == [0.0, 0.0]
    assert winner(at) == 0


def test_with_places_to_spare_only_the_prefill_is_in_the_way() -> None:
    at = snapshot(view(0, awaited=2, running=1, max_running=8, answer_s=4.0))
    assert term("awaited", at) == [-10.0]


@pytest.mark.parametrize(
    ("fields", "evicted"),
    [
        ({"used_blocks": 50, "retained_blocks": 20}, 0),  # 30 free, 12 needed
        ({"used_blocks": 75, "retained_blocks": 20}, 7),  # 5 free, 12 needed
        ({"used_blocks": 95, "retained_blocks": 3}, 3),  # no more than there is
        ({"used_blocks": 75, "retained_blocks": 20, "overlap_blocks": 8}, 0),  # its own, 4 needed
        ({"used_blocks": 99, "retained_blocks": 40, "overlap_blocks": 9}, 3),
    ],
)
def test_what_is_retained_counts_when_it_would_have_to_go(
    fields: dict[str, Any], evicted: int
) -> None:
    """A block takes 1 s; with an answer of 32 tokens the prompt of ten blocks takes twelve."""
    assert term("room", snapshot(view(0, **fields), output_tokens=32.0)) == [-float(evicted)]


@pytest.mark.parametrize(
    ("hints", "wanted"),
    [
        ({"agent_state": "planning"}, "small"),
        ({"agent_state": "calling"}, "small"),
        ({"agent_state": "answering"}, "large"),
        ({"agent_state": "calling", "pool": "gold"}, "gold"),
        ({}, ""),
    ],
)
def test_short_structured_steps_are_for_small_models(hints: dict[str, Any], wanted: str) -> None:
    assert wanted_pool(RoutingHints(**hints)) == wanted
    small, large = view(0, tags=frozenset({"pool=small"})), view(1, tags=frozenset({"pool=large"}))
    at = snapshot(small, large, pool=wanted)
    assert term("pool", at) == [
        0.0 if wanted in ("", "gold", pool) else -agent.WRONG_POOL_S for pool in ("small", "large")
    ]


def test_a_pool_is_preferred_not_insisted_on() -> None:
    small = view(0, tags=frozenset({"fast", "pool=small"}), prefill_s=9.0)
    assert winner(snapshot(small, view(1), pool="small")) == 1
    assert pool_of(small.tags) == "small"
    assert pool_of({"fast"}) == ""


def test_how_long_blocks_are_kept() -> None:
    """Twice the agent's own guess and a little more, but not for ever."""
    assert retain_s(RoutingHints()) == 0.0
    assert retain_s(RoutingHints(next_turn_s=0.0)) == 5.0
    assert retain_s(RoutingHints(next_turn_s=10.0)) == 25.0
    assert retain_s(RoutingHints(next_turn_s=1e9)) == MAX_RETAIN_S
    assert retain_s(RoutingHints(next_turn_s=-1.0)) == 5.0


def step(selector: Selector, name: str, now: float, **hints: Any) -> int:
    """A whole request of a session, which ends at `now`; the worker."""
    wanted = route([zlib.crc32(name.encode()) % 90] * 40, name, **hints)
    decision = selector.select(wanted, now)
    instance = decision.worker.instance_id
    selector.report(RequestReport(name, instance, "first_token", 1.0), now)
    selector.report(RequestReport(name, instance, "finished", 1.0, 4), now)
    return decision.worker.worker_id


def awaited(selector: Selector, now: float) -> list[int]:
    return [view.awaited for view in selector.views(route([1] * 8), now)]


def test_sessions_are_awaited_from_a_little_before_they_said_until_they_are_given_up() -> None:
    selector = fleet(engines=1)
    step(selector, "a1", 0.0, session="a", next_turn_s=20.0)
    assert awaited(selector, 10.0) == [0]
    assert awaited(selector, 16.0) == [1]
    assert awaited(selector, 44.0) == [1]  # late
    assert awaited(selector, 45.0) == [0]


def test_a_session_that_comes_back_anywhere_is_awaited_no_more() -> None:
    selector = fleet(engines=2)
    home = step(selector, "a1", 0.0, session="a", next_turn_s=2.0)
    assert awaited(selector, 1.0)[home] == 1
    selector.select(route([7] * 40, "a2", session="a"), 1.0, {FIRST + home})
    assert awaited(selector, 1.0) == [0, 0]


def test_another_router_awaits_it_as_well() -> None:
    """It hears of each decision and each report."""
    selector, other = fleet(engines=2), fleet(engines=2)
    selector.tell = lambda routed: other.count(routed, 0.0)
    selector.heard = lambda report: other.report(report, 0.0)
    home = step(selector, "a1", 0.0, session="a", next_turn_s=2.0)
    assert awaited(other, 1.0)[home] == 1
    assert awaited(other, 1.0) == awaited(selector, 1.0)
    selector.select(route([7] * 40, "a2", session="a"), 1.0)
    assert awaited(other, 1.0) == [0, 0]


def test_only_the_engine_that_answered_has_its_blocks() -> None:
    """Not the one that computed the prompt for it."""
    selector = fleet(engines=2)
    selector.prefill_rule = PrefillRule(0)
    for worker, role in zip(selector.workers.values(), ("decode", "prefill"), strict=True):
        worker.source.role = role  # type: ignore[assignment]
    decision = selector.select(route([7] * 40, "a1", session="a", next_turn_s=2.0), 0.0)
    assert decision.prefill_id
    for name, instance in ((decision.prefill_id, FIRST + 1), ("a1", FIRST)):
        selector.report(RequestReport(name, instance, "first_token", 1.0), 0.5)
        selector.report(RequestReport(name, instance, "finished", 1.0, 4), 0.5)
    loads = [selector.active.load(instance) for instance in (FIRST, FIRST + 1)]
    assert [load.awaited(1.0) for load in loads] == [1, 0]


def test_who_does_not_say_when_is_not_awaited() -> None:
    selector = fleet(engines=1)
    step(selector, "a1", 0.0, session="a")
    step(selector, "b1", 0.0, next_turn_s=1.0)
    assert awaited(selector, 1.0) == [0]


def test_many_sessions_leave_no_more_than_a_bounded_memory() -> None:
    selector = fleet(engines=1)
    for number in range(1100):
        step(selector, f"{number}", 0.0, session=f"{number}", next_turn_s=1.0)
    assert awaited(selector, 1.0) == [1024]


def test_pools_are_not_compared_with_each_other() -> None:
    """A large model is slower than a small one, and well."""
    selector = fleet(engines=2)
    selector.workers[FIRST].tags = frozenset({"pool=small"})
    kinds = {known.kind for known in figures(selector.workers, 0.0).values()}
    assert len(kinds) == 2
