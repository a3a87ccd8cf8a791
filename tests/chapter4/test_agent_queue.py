"""Who goes next when steps of a task and new conversations wait, in the queue and the router."""

import itertools
from collections import Counter

from chapter4.admission import Admission, QueueSettings, Ticket
from chapter4.fair_queue import Queued
from chapter4.request_queue import OVERTAKEN, RequestQueue
from common.protocol import EngineMetrics
from common.protocol_routing import RequestReport
from tests.chapter4.fleet import FIRST, fleet, route

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

NEW, STEP = False, True


class Queue:
    """A queue of requests that may all go, by what they are."""

    def __init__(self, size: int = 1000) -> None:
        self.queue = RequestQueue(size, 30)
        self._numbers = itertools.count()

    def add(
        self, returning: bool, priority: int = 0, tenant: str = "", cost: float = 1.0
    ) -> Queued | None:
        """Who leaves for it."""
        number = next(self._numbers)
        request = Queued(number, 0.0, tenant, priority, cost, returning=returning)
        return self.queue.add(request)

    def take(self) -> Queued | None:
        return self.queue.take(lambda request: True)

    def drain(self) -> list[Queued]:
        return list(iter(self.take, None))


def test_a_step_goes_before_a_new_conversation() -> None:
    queue = Queue()
    for returning in (NEW, STEP, NEW, STEP):
        queue.add(returning)
    assert queue.queue.returning == 2
    assert [request.number for request in queue.drain()] == [1, 3, 0, 2]
    assert queue.queue.returning == 0


def test_new_conversations_do_not_starve() -> None:
    """One of them goes after three steps, however many of those wait."""
    queue = Queue()
    for _ in range(20):
        queue.add(STEP)
    for _ in range(5):
        queue.add(NEW)
    order = [request.returning for request in queue.drain()]
    assert order[:12] == [STEP, STEP, STEP, NEW] * 3
    assert Counter(order) == {STEP: 20, NEW: 5}


def test_to_overtake_nobody_does_not_count() -> None:
    queue = Queue()
    for _ in range(10):
        queue.add(STEP)
        queue.take()
    queue.add(NEW)
    for _ in range(5):
        queue.add(STEP)
    assert [request.returning for request in queue.drain()] == [STEP, STEP, STEP, NEW, STEP, STEP]


def test_what_a_client_says_of_its_priority_goes_before_all_that() -> None:
    queue = Queue()
    for returning, priority in ((STEP, 0), (NEW, 5), (STEP, -1), (NEW, 0), (STEP, 5)):
        queue.add(returning, priority)
    order = [(request.priority, request.returning) for request in queue.drain()]
    assert order == [(5, STEP), (5, NEW), (0, STEP), (0, NEW), (-1, STEP)]


def test_tenants_share_what_steps_get() -> None:
    queue = Queue()
    for _ in range(10):
        queue.add(STEP, tenant="heavy", cost=100)
    queue.add(STEP, tenant="light", cost=100)
    assert "light" in [request.tenant for request in (queue.drain()[:2])]


def test_in_a_full_queue_a_new_conversation_leaves_for_a_step() -> None:
    queue = Queue(size=2)
    queue.add(NEW)
    queue.add(NEW)
    left = queue.add(STEP)
    assert left is not None
    assert not left.returning
    assert queue.add(NEW, tenant="") is not None


def test_steps_of_a_heavy_tenant_do_not_push_out_another() -> None:
    queue = Queue(size=4)
    for _ in range(3):
        queue.add(STEP, tenant="heavy")
    queue.add(NEW, tenant="light")
    left = queue.add(STEP, tenant="heavy")
    assert left is not None
    assert left.number == 4
    assert queue.queue.depths() == {0: {"light": 1, "heavy": 3}}


@pytest.mark.parametrize("returning", [NEW, STEP])
def test_in_a_full_queue_the_heaviest_tenant_makes_room_first_with_what_is_new(
    returning: bool,
) -> None:
    """Whatever it is that comes: `light` has fewer waiting."""
    queue = Queue(size=5)
    queue.add(NEW, tenant="light")
    for heavy in (STEP, NEW, STEP, NEW):
        queue.add(heavy, tenant="heavy")
    left = [queue.add(returning, tenant="light")]
    left.append(queue.add(NEW, priority=1, tenant="other"))
    assert [request and request.number for request in left] == [4, 2]


def test_a_step_leaves_too_if_its_tenant_has_nothing_new() -> None:
    queue = Queue(size=3)
    for _ in range(3):
        queue.add(STEP, tenant="heavy")
    left = queue.add(NEW, tenant="light")
    assert left is not None
    assert left.number == 2


def test_depths_are_those_of_a_priority_as_before() -> None:
    queue = Queue()
    for returning, tenant in ((STEP, "a"), (NEW, "a"), (NEW, "b")):
        queue.add(returning, tenant=tenant)
    queue.add(STEP, priority=3)
    assert queue.queue.depths() == {3: {"": 1}, 0: {"a": 2, "b": 1}}


@settings(max_examples=200, deadline=None, database=None)
@given(
    st.lists(
        st.one_of(st.tuples(st.booleans(), st.integers(-1, 1), st.sampled_from("ab")), st.none()),
        max_size=60,
    )
)
def test_whatever_comes_the_order_holds(
    arrivals: list[tuple[bool, int, str] | None],
) -> None:
    """None takes one. Nobody is lost, priorities are strict, and nobody new is overtaken often."""
    queue = Queue()
    waiting: list[Queued] = []
    in_a_row: Counter[int] = Counter()

    def take() -> None:
        taken = queue.take()
        assert (taken is None) == (not waiting)
        if taken is None:
            return
        waiting.remove(taken)
        assert taken.priority == max(r.priority for r in [taken, *waiting])
        new = [r for r in waiting if r.priority == taken.priority and not r.returning]
        if taken.returning and new:
            in_a_row[taken.priority] += 1
            assert in_a_row[taken.priority] <= OVERTAKEN
        else:
            in_a_row[taken.priority] = 0

    for arrival in arrivals:
        if arrival is None:
            take()
        else:
            returning, priority, tenant = arrival
            assert queue.add(returning, priority, tenant) is None
            waiting = list(queue.queue)
    while waiting:
        take()
    take()
    assert len(queue.queue) == queue.queue.returning == 0


@pytest.mark.parametrize("step", [1, 2])
def test_the_router_lets_the_step_of_a_task_go_first(step: int) -> None:
    """The engine runs one and has one more; two wait in the router."""
    selector = fleet(engines=1, max_running=1)
    settled: list[str] = []

    def on_settled(ticket: Ticket) -> None:
        settled.append(ticket.wanted.request_id)

    admission = Admission(selector, QueueSettings(), on_settled)
    for name in ("one", "two", "new"):
        admission.offer(route([1] * 8, name), 0.0)
    admission.offer(route([2] * 8, "agent", session="a", step=step), 0.0)
    assert settled == ["one", "two"]
    for name in ("one", "two"):
        selector.report(RequestReport(name, FIRST, "finished", 1.0, 1), 1.0)
        selector.workers[FIRST].hear(EngineMetrics(0, 0, 0, 100), 1.0)
        admission.drain(1.0)
    assert settled[2] == ("agent" if step > 1 else "new")
