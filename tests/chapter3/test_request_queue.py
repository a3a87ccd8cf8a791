"""The router's queue by itself: order, fairness, bound, deadlines."""

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Literal

from chapter3.fair_queue import REMEMBERED_TENANTS, FairQueue, Group, Queued
from chapter3.request_queue import RequestQueue

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


def anyone(request: Queued) -> bool:
    return True


class Arrivals:
    """Makes requests; each has a number of its own."""

    def __init__(self) -> None:
        self.numbers = itertools.count()

    def __call__(self, tenant: str = "", priority: int = 0, **fields: object) -> Queued:
        arrived = float(fields.pop("arrived", 0.0))  # type: ignore[arg-type]
        request = Queued(next(self.numbers), arrived, tenant, priority)
        for name, value in fields.items():
            setattr(request, name, value)
        return request


@pytest.fixture
def arrival() -> Arrivals:
    return Arrivals()


def drained(queue: RequestQueue, may_go: Callable[[Queued], bool] = anyone) -> list[Queued]:
    return list(iter(lambda: queue.take(may_go), None))


def test_the_first_to_come_goes_first(arrival: Arrivals) -> None:
    queue = RequestQueue(10, 30)
    requests = [arrival() for _ in range(5)]
    for request in requests:
        assert queue.add(request) is None
    assert drained(queue) == requests


def test_a_higher_priority_goes_before_all_others(arrival: Arrivals) -> None:
    queue = RequestQueue(10, 30)
    for priority in (0, -3, 7, 0, 7):
        queue.add(arrival(priority=priority))
    assert [request.priority for request in drained(queue)] == [7, 7, 0, 0, -3]


def test_the_shortest_goes_first_within_a_tenant(arrival: Arrivals) -> None:
    queue = RequestQueue(10, 30, "shortest")
    for tokens in (500, 20, 3000, 20, 100):
        queue.add(arrival(prefill_tokens=tokens))
    order = drained(queue)
    assert [request.prefill_tokens for request in order] == [20, 20, 100, 500, 3000]
    assert order[0].number < order[1].number


def test_a_light_tenant_does_not_wait_for_a_heavy_one(arrival: Arrivals) -> None:
    queue = RequestQueue(1000, 30)
    for _ in range(100):
        queue.add(arrival("heavy", cost=100))
    light = arrival("light", cost=100)
    queue.add(light)
    queue.take(anyone)
    assert queue.take(anyone) is light


def test_tenants_share_by_cost_not_by_number(arrival: Arrivals) -> None:
    queue = RequestQueue(1000, 30)
    for _ in range(100):
        queue.add(arrival("long", cost=900))
        queue.add(arrival("short", cost=100))
    served = {"long": 0.0, "short": 0.0}
    for request in (queue.take(anyone) for _ in range(50)):
        assert request is not None
        served[request.tenant] += request.cost
    assert abs(served["long"] - served["short"]) <= 900


def test_a_tenant_cannot_save_up_by_being_idle(arrival: Arrivals) -> None:
    queue = RequestQueue(1000, 30)
    for _ in range(50):
        queue.add(arrival("busy"))
    for _ in range(40):
        queue.take(anyone)
    for _ in range(50):
        queue.add(arrival("late"))
    served = Counter(queue.take(anyone).tenant for _ in range(10))  # type: ignore[union-attr]
    assert served == {"busy": 5, "late": 5}


def test_a_tenant_that_comes_back_has_not_been_forgotten(arrival: Arrivals) -> None:
    """One with a single request at a time gets its share, not more."""
    queue = RequestQueue(1000, 30)
    for _ in range(50):
        queue.add(arrival("busy", cost=1))
    served: Counter[str] = Counter()
    queue.add(arrival("one at a time", cost=3))
    for _ in range(20):
        request = queue.take(anyone)
        assert request is not None
        served[request.tenant] += 1
        if request.tenant != "busy":
            queue.add(arrival("one at a time", cost=3))
    assert served["one at a time"] in (5, 6)


def test_who_may_not_go_is_passed_over_and_keeps_its_place(arrival: Arrivals) -> None:
    queue = RequestQueue(10, 30)
    first, second, third = arrival(group=Group("a")), arrival(group=Group("b")), arrival()
    for request in (first, second, third):
        queue.add(request)
    assert queue.take(lambda request: request.group == Group("b")) is second
    assert drained(queue) == [first, third]


def test_a_full_queue_refuses_who_comes_last(arrival: Arrivals) -> None:
    queue = RequestQueue(2, 30)
    queue.add(arrival())
    queue.add(arrival())
    late = arrival()
    assert queue.add(late) is late
    assert len(queue) == 2


def test_a_full_queue_makes_room_for_a_higher_priority(arrival: Arrivals) -> None:
    queue = RequestQueue(2, 30)
    low = [arrival(priority=-1), arrival(priority=-1)]
    for request in low:
        queue.add(request)
    urgent = arrival(priority=5)
    assert queue.add(urgent) is low[1]
    assert drained(queue) == [urgent, low[0]]


def test_a_heavy_tenant_cannot_keep_others_out_of_a_full_queue(arrival: Arrivals) -> None:
    queue = RequestQueue(10, 30)
    for _ in range(10):
        queue.add(arrival("heavy"))
    for number in range(5):
        displaced = queue.add(arrival("light"))
        assert displaced is not None
        assert displaced.tenant == "heavy", number
    light = arrival("light")
    assert queue.add(light) is light  # as many as the heavy one


def test_no_place_for_anyone(arrival: Arrivals) -> None:
    queue = RequestQueue(0, 30)
    request = arrival()
    assert queue.add(request) is request
    assert len(queue) == 0


def test_who_left_costs_its_tenant_nothing(arrival: Arrivals) -> None:
    queue = RequestQueue(10, 30)
    gone = arrival("a", cost=1000)
    queue.add(gone)
    queue.remove(gone)
    first = arrival("a")
    queue.add(first)
    queue.add(arrival("b"))
    assert queue.take(anyone) is first


def test_deadlines_that_cannot_be_met(arrival: Arrivals) -> None:
    queue = RequestQueue(10, 30)
    soon, late, never = arrival(start_by=5.0), arrival(start_by=9.0), arrival()
    for request in (soon, late, never):
        queue.add(request)
    assert queue.next_due() == 5.0
    assert queue.too_late(3.0, 1.0) == []
    assert queue.too_late(3.0, 3.0) == [soon]
    assert queue.next_due() == 9.0
    assert queue.too_late(9.5, 0.0) == [late]
    assert queue.next_due() == 30.0
    assert drained(queue) == [never]


def test_who_has_waited_for_too_long(arrival: Arrivals) -> None:
    queue = RequestQueue(10, timeout_s=30)
    first, second = arrival(arrived=1.0), arrival(arrived=2.0, priority=9)
    queue.add(first)
    queue.add(second)
    assert queue.timed_out(30.9) == []
    assert queue.timed_out(31.0) == [first]
    assert queue.timed_out(99.0) == [second]
    assert queue.next_due() == float("inf")


def test_tenants_that_have_gone_are_forgotten(arrival: Arrivals) -> None:
    """Names of tenants come from clients: new ones for ever must not fill the memory."""
    queue = FairQueue("fifo")
    queue.add(arrival("patient", group=Group("blocked"), cost=1))
    for number in range(3 * REMEMBERED_TENANTS):
        queue.add(arrival(f"tenant {number}"))
        queue.take(lambda request: request.group != Group("blocked"))
    assert len(queue._tenants) <= 2 * REMEMBERED_TENANTS + 1


Step = Literal["take", "leave"] | tuple[str, int, int]
REQUESTS = st.tuples(st.sampled_from("abc"), st.integers(-2, 2), st.integers(1, 500))


@settings(deadline=None, database=None)
@given(st.lists(st.one_of(REQUESTS, st.just("take"), st.just("leave")), max_size=60))
def test_nobody_is_lost_and_no_lower_priority_goes_first(steps: list[Step]) -> None:
    arrival, queue = Arrivals(), RequestQueue(8, 30)
    waiting: set[Queued] = set()
    for step in steps:
        if step == "take":
            request = queue.take(anyone)
            assert (request is None) == (not waiting)
            if request is not None:
                assert request.priority == max(other.priority for other in waiting)
                waiting.remove(request)
        elif step == "leave":
            if waiting:
                gone = min(waiting, key=lambda request: request.number)
                queue.remove(gone)
                waiting.remove(gone)
        else:
            tenant, priority, cost = step
            request = arrival(tenant, priority, cost=cost)
            waiting.add(request)
            leaves = queue.add(request)
            if leaves is not None:
                waiting.remove(leaves)
                assert all(other.priority >= leaves.priority for other in waiting)
        assert set(queue) == waiting
        assert len(queue) == len(waiting) <= 8
        assert {request.group for request in waiting} == set(queue.groups)
        depths = queue.depths()
        assert sum(sum(tenants.values()) for tenants in depths.values()) == len(waiting)
