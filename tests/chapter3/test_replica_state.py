"""Two routers in virtual time, with a wire between them that delays, loses and reorders."""

from typing import Any

from chapter3.canary import figures
from chapter3.decision import PolicyInUse
from chapter3.replica_state import ReplicaState
from chapter3.router import change_policy
from chapter3.selector import Selector
from common.protocol_replicas import (
    EngineFailed,
    ReplicaBatch,
    ReplicaMessage,
    Reported,
    Routed,
)
from common.protocol_routing import PolicyRequest, RequestReport
from tests.chapter3.fleet import FIRST, fleet, route

import msgspec

TOKENS = [1, 2, 3, 4] * 5
SECOND = FIRST + 1


class Replica:
    """A router; what it tells is in `told` until `deliver`."""

    def __init__(self) -> None:
        self.selector: Selector = fleet("earliest_start")
        self.selector.health.check(figures(self.selector.workers, 0.0), 0.0)
        self.state = ReplicaState(self.selector, change_policy)
        self.told: list[ReplicaMessage] = []
        self.selector.tell = self.told.append

    def select(self, request_id: str, now: float = 0.0, tokens: list[int] = TOKENS) -> int:
        wanted = route(tokens, request_id=request_id)
        return self.selector.select(wanted, now).worker.instance_id

    def report(self, request_id: str, instance: int, kind: Any, now: float = 0.0) -> None:
        known = RequestReport(request_id, instance, kind, 5.0, 3)
        self.selector.report(known, now)
        self.told.append(Reported(known))

    def deliver(self, other: "Replica", now: float = 0.0) -> None:
        wire = msgspec.msgpack.encode(ReplicaBatch(self.told))
        self.told.clear()
        for message in msgspec.msgpack.decode(wire, type=ReplicaBatch).messages:
            other.state.apply(self.state.topic, message, now)

    def join(self, other: "Replica", now: float = 0.0) -> None:
        """Take the other one's snapshot."""
        wire = msgspec.msgpack.encode(ReplicaBatch(other.state.snapshot(now)))
        messages = msgspec.msgpack.decode(wire, type=ReplicaBatch).messages
        self.state.load(other.state.topic, messages, now)

    @property
    def active(self) -> set[str]:
        return set(self.selector.active.requests)

    def loads(self) -> list[tuple[int, int, int, int]]:
        loads = [self.selector.active.load(instance) for instance in (FIRST, SECOND)]
        return [
            (x.prefill_tokens, x.prefill_requests, x.decode_requests, x.active_blocks)
            for x in loads
        ]  # fmt: skip


def test_one_follows_the_others_decision_before_any_event_comes() -> None:
    one, two = Replica(), Replica()
    engine = one.select("a/0")
    one.deliver(two)
    assert [two.select(f"b{n}/0") for n in range(3)] == [engine] * 3
    two.deliver(one)
    assert one.active == two.active == {"a/0", "b0/0", "b1/0", "b2/0"}
    assert one.loads() == two.loads()


def test_load_that_one_sent_counts_with_the_other() -> None:
    one, two = Replica(), Replica()
    engine = one.select("a/0")
    one.deliver(two)
    assert two.select("b/0", tokens=[9] * 20) != engine


def test_a_report_to_either_ends_the_request_with_both() -> None:
    one, two = Replica(), Replica()
    engine = one.select("a/0")
    one.deliver(two)
    two.report("a/0", engine, "first_token", 1.0)
    two.deliver(one, 1.0)
    assert one.loads() == two.loads()
    assert one.selector.active.load(engine).decode_requests == 1
    one.report("a/0", engine, "finished", 2.0)
    one.deliver(two, 2.0)
    assert one.active == two.active == set()


def test_an_end_that_is_heard_before_the_beginning_leaves_nothing_behind() -> None:
    one, two = Replica(), Replica()
    engine = one.select("a/0")
    two.report("a/0", engine, "finished", 1.0)
    one.deliver(two, 1.0)
    two.deliver(one, 1.0)
    assert one.active == two.active == set()
    assert not any(record.sent for record in two.selector.health.engines.values())


def test_one_that_comes_late_learns_of_all_that_is_under_way() -> None:
    one = Replica()
    engines = {f"a{n}/0": one.select(f"a{n}/0", tokens=[n] * 20) for n in range(6)}
    one.report("a3/0", engines["a3/0"], "first_token", 1.0)
    late = Replica()
    late.join(one, 2.0)
    assert late.active == one.active
    assert late.loads() == one.loads()
    since = {key: request.since for key, request in late.selector.active.requests.items()}
    assert since == dict.fromkeys(engines, 0.0)
    # Blocks of a prompt that is being computed count as cached there, as with the first.
    assert late.select("b/0", 2.0, tokens=[4] * 20) == engines["a4/0"]


def test_a_snapshot_ends_what_was_missed_and_keeps_what_is_our_own() -> None:
    one, two = Replica(), Replica()
    engine = one.select("theirs/0")
    one.select("theirs too/0")
    one.deliver(two)
    two.select("ours/0")
    one.report("theirs/0", engine, "finished")
    one.told.clear()  # it is lost
    two.join(one)
    assert two.active == {"theirs too/0", "ours/0"}


def test_what_a_router_that_is_gone_had_sent_is_known_to_all_that_come_later() -> None:
    gone, stays, comes = Replica(), Replica(), Replica()
    engine = gone.select("a/0")
    gone.deliver(stays)
    comes.join(stays)
    assert comes.active == {"a/0"}
    comes.report("a/0", engine, "finished")
    comes.deliver(stays)
    assert stays.active == comes.active == set()


def test_of_two_decisions_about_one_attempt_the_first_that_is_known_counts() -> None:
    """A router that hung chooses when its client has asked another one long since."""
    hung, other = Replica(), Replica()
    other.select("a/0")
    for name in ("x/0", "y/0"):  # so that it chooses another engine
        hung.select(name)
        hung.report(name, FIRST, "failed")
    hung.told.clear()
    hung.select("a/0", tokens=[5] * 20)
    hung.deliver(other)
    other.deliver(hung)
    engine = other.selector.active.requests["a/0"].instance
    other.report("a/0", engine, "finished")
    other.deliver(hung)
    assert hung.active == other.active == set()
    for replica in (hung, other):
        assert not any(record.sent for record in replica.selector.health.engines.values())


def test_an_engine_that_failed_one_is_out_with_both() -> None:
    one, two = Replica(), Replica()
    two.state.apply("other", EngineFailed(FIRST, "a/1"), 0.0)
    assert {two.select(f"b{n}/0") for n in range(4)} == {SECOND}
    assert FIRST in {one.select(f"c{n}/0", tokens=[n] * 20) for n in range(4)}


def test_the_latest_change_of_the_policy_counts_everywhere() -> None:
    one, two, late = Replica(), Replica(), Replica()

    def change(replica: Replica, policy: str, time: float) -> None:
        change_policy(replica.selector, PolicyRequest(policy, "random"))
        replica.told.append(replica.state.policy_changed(time))

    change(one, "kv", 10.0)
    change(two, "least_loaded", 11.0)
    one.deliver(two)
    two.deliver(one)
    late.join(one)
    for replica in (one, two, late):
        assert replica.selector.policy.name == "least_loaded"
        assert replica.selector.shadow is not None
        assert replica.selector.shadow.name == "random"
    change(one, "dynamo", 5.0)  # its clock is late
    one.deliver(two)
    assert two.selector.policy.name == "dynamo"


def test_a_policy_that_cannot_be_loaded_here_changes_nothing() -> None:
    one, two = Replica(), Replica()
    one.selector.policy = PolicyInUse("/only/here.py:mine", one.selector.policy.policy)
    one.told.append(one.state.policy_changed(1.0))
    one.deliver(two)
    assert two.selector.policy.name == "earliest_start"


def test_what_is_remembered_of_others_requests_is_bounded() -> None:
    two = Replica()
    for number in range(5000):
        two.state.apply("other", Routed(f"r{number}/0", FIRST, [], 0, 5, 5, 1), 0.0)
        report = RequestReport(f"r{number}/0", FIRST, "finished", output_tokens=1)
        two.state.apply("other", Reported(report), 0.0)
    assert two.active == set()
    assert len(two.state._routed_by) < 2000
