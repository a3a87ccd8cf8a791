"""When requests are routed: saturation, priorities, tenants, deadlines, in virtual time."""

from collections import Counter

from chapter3.admission import ENGINE_WAIT_S, QueueSettings, Ticket
from chapter3.decision import Decision
from chapter3.saturation import Limits
from common.protocol import ErrorInfo, PipelineError
from tests.chapter3.fleet import FIRST
from tests.chapter3.virtual_engines import VirtualEngines

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


def error(ticket: Ticket) -> ErrorInfo:
    assert isinstance(ticket.outcome, PipelineError)
    return ticket.outcome.info


def test_with_engines_to_spare_nothing_waits() -> None:
    engines = VirtualEngines(QueueSettings(), engines=2, max_running=4)
    for number in range(8):
        ticket = engines.ask(f"{number}")
        assert isinstance(ticket.outcome, Decision)
        assert ticket.waited_s == 0
    assert len(engines.admission.queue) == 0


def test_the_router_holds_what_the_engines_cannot_run() -> None:
    engines = VirtualEngines(QueueSettings(), engines=2, max_running=2)
    for number in range(50):
        engines.ask(f"{number}")
    assert len(engines.routed) == 2 * (2 + 1)  # one more than each can run
    assert len(engines.admission.queue) == 44
    engines.run()
    assert len(engines.routed) == 50
    assert all(engine.most_waiting <= 1 for engine in engines.engines.values())


def test_the_engines_never_wait_for_the_router() -> None:
    engines = VirtualEngines(QueueSettings(), engines=2, max_running=2, service_s=1.0)
    for number in range(40):
        engines.ask(f"{number}")
    engines.run()
    assert engines.tickets["39"].waited_s <= 40 / 4 * 1.0  # as fast as four at a time can be


def test_without_limits_the_engines_hold_everything() -> None:
    engines = VirtualEngines(QueueSettings(limits=None))
    for number in range(50):
        engines.ask(f"{number}")
    assert len(engines.routed) == 50


def test_a_higher_priority_overtakes_all_that_wait() -> None:
    engines = VirtualEngines(QueueSettings())
    for number in range(10):
        engines.ask(f"bulk {number}")
    engines.ask("urgent", hints={"priority": 5})
    engines.run()
    assert engines.routed[:3] == ["bulk 0", "bulk 1", "urgent"]


def test_a_low_priority_starves_and_is_told_so() -> None:
    """Strict priorities: that is what they mean; the timeout bounds it."""
    engines = VirtualEngines(QueueSettings(timeout_s=10))
    for number in range(5):
        engines.ask(f"first {number}")
    engines.ask("low", hints={"priority": -1})
    for second in range(1, 30):
        engines.at(float(second), lambda second=second: engines.ask(f"high {second}"))  # type: ignore[misc]
    engines.run()
    assert engines.refused["low"] == ("timeout", 10.0)
    assert "waited for 10 s" in error(engines.tickets["low"]).message


def test_a_heavy_tenant_does_not_slow_a_light_one() -> None:
    engines = VirtualEngines(QueueSettings(timeout_s=1000), service_s=1.0)
    for number in range(200):
        engines.ask(f"heavy {number}", hints={"tenant": "heavy"})
    for number in range(20):
        engines.at(
            number * 5.0 + 0.5,
            lambda number=number: engines.ask(f"light {number}", hints={"tenant": "light"}),  # type: ignore[misc]
        )
    engines.run()
    waits = [engines.tickets[f"light {number}"].waited_s for number in range(20)]
    assert max(waits) <= 2.0
    assert len(engines.routed) == 220


def test_long_prompts_cost_their_tenant_more() -> None:
    engines = VirtualEngines(QueueSettings(timeout_s=1000))
    for number in range(100):
        engines.ask(f"long {number}", tokens=900, max_tokens=100, hints={"tenant": "long"})
        engines.ask(f"short {number}", tokens=100, max_tokens=100, hints={"tenant": "short"})
    engines.run(until=60.0)
    served = Counter(request_id.split()[0] for request_id in engines.routed[2:])
    assert 4 <= served["short"] / served["long"] <= 6  # 1000 tokens against 200


def test_to_understate_the_output_buys_nothing() -> None:
    engines = VirtualEngines(QueueSettings(timeout_s=1000))
    for number in range(50):
        engines.ask(f"honest {number}", max_tokens=500, hints={"tenant": "honest"})
        hints = {"tenant": "sly", "output_tokens": 1}
        engines.ask(f"sly {number}", max_tokens=500, hints=hints)
    engines.run(until=40.0)
    served = Counter(request_id.split()[0] for request_id in engines.routed)
    assert abs(served["sly"] - served["honest"]) <= 2


def test_a_deadline_that_has_passed_is_refused_at_once() -> None:
    engines = VirtualEngines(QueueSettings())
    ticket = engines.ask("late", hints={"deadline_ms": 100.0}, waited_ms=150.0)
    assert engines.refused["late"] == ("deadline", 0.0)
    assert error(ticket).kind == "overloaded"
    assert "cannot come within 100 ms: 150 ms have passed" in error(ticket).message


def test_a_deadline_shorter_than_the_prefill_is_refused_at_once() -> None:
    engines = VirtualEngines(QueueSettings())
    rate = engines.selector.active.load(FIRST).prefill_tokens_per_s
    engines.ask("possible", tokens=800, hints={"deadline_ms": 800 / rate * 1e3 * 1.5})
    engines.ask("impossible", tokens=800, hints={"deadline_ms": 800 / rate * 1e3 / 1.5})
    assert engines.routed == ["possible"]
    assert engines.refused["impossible"][0] == "deadline"


def test_prompts_that_go_before_it_count_against_a_deadline() -> None:
    engines = VirtualEngines(QueueSettings(), max_running=10)
    rate = engines.selector.active.load(FIRST).prefill_tokens_per_s
    engines.ask("before", tokens=8000)
    engines.ask("hopeless", tokens=8, hints={"deadline_ms": 4000 / rate * 1e3})
    engines.ask("patient", tokens=8, hints={"deadline_ms": 16000 / rate * 1e3})
    assert engines.routed == ["before", "patient"]
    assert engines.refused["hopeless"][0] == "deadline"


def test_the_wait_for_a_place_counts_against_a_deadline() -> None:
    """Once it is known how long answers take: here 10 s, and one runs at a time."""
    engines = VirtualEngines(QueueSettings(timeout_s=1000), service_s=10.0)
    engines.selector.active.load(FIRST).answer_s = 10.0
    engines.ask("running")
    engines.publish(FIRST)
    engines.ask("hopeless", hints={"deadline_ms": 3000.0})
    engines.ask("patient", hints={"deadline_ms": 30_000.0})
    assert engines.refused["hopeless"][0] == "deadline"
    assert engines.routed == ["running", "patient"]


def test_who_waits_is_refused_when_the_deadline_can_no_longer_be_met() -> None:
    engines = VirtualEngines(QueueSettings(timeout_s=1000), service_s=10.0)
    rate = engines.selector.active.load(FIRST).prefill_tokens_per_s
    for number in range(5):
        engines.ask(f"{number}")
    engines.ask("in a hurry", tokens=800, hints={"deadline_ms": 3000.0}, waited_ms=500.0)
    engines.run()
    why, when = engines.refused["in a hurry"]
    assert why == "deadline"
    assert when == pytest.approx(2.5 - 800 / rate, abs=0.01)
    assert len(engines.routed) == 5


def test_a_bounded_queue_says_when_to_try_again() -> None:
    engines = VirtualEngines(QueueSettings(size=10, timeout_s=1000), service_s=2.0)
    for number in range(12):
        engines.ask(f"{number}")
    refused = engines.ask("one too many")
    assert error(refused).kind == "overloaded"
    assert "10 requests wait, which is as many as may" in error(refused).message
    assert error(refused).retry_after_s == 1.0  # nothing is known yet
    engines.run(until=10.5)
    for number in range(10):
        engines.ask(f"more {number}")
    retry_after_s = error(engines.ask("again")).retry_after_s
    assert retry_after_s is not None
    assert 15 <= retry_after_s <= 25  # ten requests of 2 s each


def test_who_is_displaced_hears_of_it() -> None:
    engines = VirtualEngines(QueueSettings(size=2))
    for number in range(4):
        engines.ask(f"{number}")
    engines.ask("urgent", hints={"priority": 1})
    assert engines.refused["3"][0] == "displaced"
    assert "higher priority" in error(engines.tickets["3"]).message


def test_a_client_that_leaves_gives_up_its_place() -> None:
    engines = VirtualEngines(QueueSettings(size=1))
    for number in range(3):
        engines.ask(f"{number}")
    engines.admission.cancel(engines.tickets["2"])
    assert len(engines.admission.queue) == 0
    engines.ask("next")
    engines.run()
    assert engines.routed == ["0", "1", "next"]
    engines.admission.cancel(engines.tickets["next"])  # too late, and no harm


def test_a_request_that_was_routed_before_does_not_wait_again() -> None:
    """Its engine died; its client has waited once, and may be in the middle of the answer."""
    engines = VirtualEngines(QueueSettings(size=0), engines=2)
    for number in range(4):
        engines.ask(f"{number}")
    hints = {"deadline_ms": 1.0}
    ticket = engines.ask("again", excluded=[FIRST], admitted=True, waited_ms=500.0, hints=hints)
    assert isinstance(ticket.outcome, Decision)
    assert ticket.outcome.worker.instance_id == FIRST + 1


def test_who_may_go_to_a_free_engine_does_not_wait_for_who_may_not() -> None:
    engines = VirtualEngines(QueueSettings(), engines=2)
    for number in range(6):
        engines.ask(f"{number}")
    engines.ask("not there", excluded=[FIRST])
    engines._end(FIRST, "0")
    assert engines.routed[-1] == "4"
    engines.admission.cancel(engines.tickets["5"])
    engines._end(FIRST, engines.routed[2])
    assert "not there" not in engines.routed
    engines.ask("anywhere")
    assert engines.routed[-1] == "anywhere"


def test_a_request_waits_a_moment_for_an_engine() -> None:
    engines = VirtualEngines(QueueSettings(), engines=0)
    ticket = engines.ask("early")
    engines.at(ENGINE_WAIT_S / 2, lambda: engines.join_engine(0))
    engines.run()
    assert engines.routed == ["early"]
    assert ticket.waited_s == ENGINE_WAIT_S / 2


def test_with_no_engine_it_is_told_which_there_are() -> None:
    engines = VirtualEngines(QueueSettings(), engines=1)
    ticket = engines.ask("other model", model="no-such-model")
    engines.run()
    assert engines.refused["other model"] == ("no_engine", ENGINE_WAIT_S)
    assert error(ticket).kind == "unavailable"
    assert "No engine with the model no-such-model is ready" in error(ticket).message


def test_engines_that_all_leave_are_waited_for_a_moment_only() -> None:
    engines = VirtualEngines(QueueSettings(), service_s=100.0)
    for number in range(4):
        engines.ask(f"{number}")
    engines.at(5.0, lambda: engines.remove_engine(0))
    engines.run(until=20.0)
    assert engines.refused == dict.fromkeys("23", ("no_engine", 5.0 + ENGINE_WAIT_S))


@pytest.mark.parametrize(
    ("used_blocks", "saturated"), [(9_000, False), (9_600, True)], ids=["room", "full"]
)
def test_an_engine_whose_cache_is_full_gets_nothing_more(used_blocks: int, saturated: bool) -> None:
    engines = VirtualEngines(QueueSettings(), max_running=10)
    engines.ask("first")
    engines.publish(FIRST, used_blocks)
    engines.ask("second")
    assert ("second" not in engines.routed) == saturated


def test_an_engine_with_seconds_of_prompts_gets_nothing_more() -> None:
    engines = VirtualEngines(QueueSettings(limits=Limits(prefill_s=2.0)), max_running=100)
    rate = round(engines.selector.active.load(FIRST).prefill_tokens_per_s)
    for number in range(4):
        engines.ask(f"{number}", tokens=rate)
    assert engines.routed == ["0", "1", "2"]


def test_an_engine_that_says_it_is_idle_is_believed() -> None:
    """The processor that had its requests was killed: nobody reports that they have ended."""
    engines = VirtualEngines(QueueSettings(), service_s=1e9)
    for number in range(3):
        engines.ask(f"{number}")
    engines.engines[FIRST].running.clear()
    engines.engines[FIRST].waiting.clear()
    engines.now = 1.0
    engines.publish(FIRST)
    engines.admission.drain(engines.now)
    assert engines.routed == ["0", "1", "2"]


ARRIVALS = st.tuples(
    st.floats(0, 20),
    st.sampled_from(["a", "b"]),
    st.integers(0, 1),
    st.one_of(st.none(), st.floats(1, 5000)),
)


@settings(deadline=None, database=None, max_examples=25)
@given(st.lists(ARRIVALS, max_size=40), st.integers(1, 3), st.integers(0, 8))
def test_every_request_is_settled_once_and_deadlines_hold(
    arrivals: list[tuple[float, str, int, float | None]], engines: int, size: int
) -> None:
    """No lost wake-up: the queue is looked after only when an engine ends something or it asks."""
    running = VirtualEngines(QueueSettings(size=size, timeout_s=15), engines=engines)
    for number, (time, tenant, priority, deadline_ms) in enumerate(arrivals):
        hints = {"tenant": tenant, "priority": priority, "deadline_ms": deadline_ms}
        running.at(
            time,
            lambda number=number, hints=hints: running.ask(f"{number}", hints=hints),  # type: ignore[misc]
        )
    running.run()
    everyone = {f"{number}" for number in range(len(arrivals))}
    assert sorted([*running.routed, *running.refused]) == sorted(everyone)
    for number, (_, _, _, deadline_ms) in enumerate(arrivals):
        ticket = running.tickets[f"{number}"]
        assert ticket.waited_s <= 15 + 1e-6
        if deadline_ms is not None and isinstance(ticket.outcome, Decision):
            assert ticket.waited_s * 1e3 <= deadline_ms
    assert all(engine.most_waiting <= 1 for engine in running.engines.values())
    assert len(running.admission.queue) == 0
