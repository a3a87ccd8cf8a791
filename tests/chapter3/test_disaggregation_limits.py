"""What the roles of engines mean for their queues, their health and deadlines."""

from chapter3.active import ActiveRequests
from chapter3.admission import Admission, QueueSettings
from chapter3.canary import figures
from chapter3.disaggregation import PrefillRule, stands_alone
from chapter3.selector import Selector
from common.protocol import PipelineError
from common.protocol_transfer import MAX_RECEIVED, Role
from tests.chapter3.fleet import FIRST, load, route, view
from tests.chapter3.test_disaggregation import P0, P1, PROMPT, choice, instances, of_roles

import pytest

LONG = list(range(16_000))  # 2 s at the assumed speed


def of_sglang(*roles: Role) -> Selector:
    selector = of_roles(*roles)
    for worker in selector.workers.values():
        worker.source.info.backend = "sglang"
    return selector


def check_for(selector: Selector, seconds: float, since: float = 0.0) -> None:
    """The engines are heard of, and judged, all the time."""
    for step in range(int(seconds * 4)):
        now = since + step / 4
        for worker in selector.workers.values():
            worker.hear(load(), now)
        selector.health.check(figures(selector.workers, now), now)


def fail_thrice(selector: Selector, instance: int, since: float = 0.0) -> None:
    for attempt in range(3):
        selector.health.failed(instance, f"r{attempt}/0/prefill", since)
    check_for(selector, 0.5, since)


@pytest.mark.parametrize(
    ("waiting", "in_flight", "max_running", "pays"),
    [
        (0, 0, 8, True),
        (MAX_RECEIVED - 1, 0, None, True),
        (MAX_RECEIVED, 0, None, False),
        (0, 8 + MAX_RECEIVED - 1, 8, True),
        (0, 8 + MAX_RECEIVED, 8, False),
    ],
)
def test_kv_is_handed_over_only_where_there_is_a_place_for_it(
    waiting: int, in_flight: int, max_running: int | None, pays: bool
) -> None:
    """What has no place is not fetched in time: the prompt would be computed twice."""
    decode = view(0, waiting=waiting, prefill_requests=in_flight, max_running=max_running)
    assert PrefillRule().pays(decode, view(1)) is pays


def test_those_on_their_way_by_a_prefill_engine_need_a_place_too() -> None:
    selector = of_roles("prefill", "decode")
    selector.workers[P1].source.info.max_running = 2
    ways = [
        instances(choice(selector, f"r{n}/0", tokens=[n, *PROMPT]))[1] for n in range(1000, 1020)
    ]
    assert ways == [P0] * (2 + MAX_RECEIVED) + [None] * 2


def test_an_only_prefill_engine_that_fails_is_not_asked_until_it_is_well() -> None:
    selector = of_roles("prefill", "decode")
    fail_thrice(selector, P0)
    assert selector.health.state(P0) == "quarantined"
    assert instances(choice(selector, now=1.0)) == (P1, None)
    selector.health.sent(P0, "canary", 2.0, tokens=4, own_tokens=4, canary=True)
    selector.health.first_token(P0, "canary", 0.01, 2.01)
    selector.health.finished(P0, "canary", 0.01, 2, 2.02)
    assert selector.health.state(P0) == "probing"


def test_all_prefill_engines_may_be_out_and_no_only_decode_engine() -> None:
    selector = of_roles("prefill", "prefill", "decode")
    for instance in (P0, P1, P1 + 1):
        fail_thrice(selector, instance, instance - P0)
    states = [selector.health.state(instance) for instance in (P0, P1, P1 + 1)]
    assert states == ["quarantined", "quarantined", "healthy"]
    selector.remove(P1 + 1)
    check_for(selector, 1, 2.5)
    out = [selector.health.state(instance) != "healthy" for instance in (P0, P1)]
    assert sum(out) == 1, "there is nobody else any more"


def test_a_prefill_engine_without_which_nothing_goes_is_kept() -> None:
    selector = of_sglang("prefill", "decode")
    fail_thrice(selector, P0)
    assert selector.health.state(P0) == "healthy"
    assert "enough engines are quarantined" in selector.health.why(P0)


def test_an_sglang_that_only_decodes_gets_prompts_by_way_of_another_one() -> None:
    """However short they are, and however long they wait."""
    selector = of_sglang("prefill", "decode")
    selector.prefill_rule = PrefillRule(64, max_wait_s=1.0)
    selector.workers[P1].hear(load(waiting=100), 0.0)
    for number in range(3):
        assert instances(choice(selector, f"r{number}/0", tokens=[7] * (4 + number))) == (P1, P0)
    choice(selector, "long", tokens=LONG)
    assert instances(choice(selector, "short", tokens=[1, 2, 3])) == (P1, P0)


@pytest.mark.parametrize("prefill", ["llamacpp", None])
def test_an_sglang_without_one_whose_kv_it_takes_gets_nothing_if_another_can(
    prefill: str | None,
) -> None:
    """KV of another backend is of no use to it, and it cannot compute the prompt itself."""
    selector = of_roles("prefill", "decode", "aggregated")
    selector.workers[P1].source.info.backend = "sglang"
    if prefill is None:
        selector.remove(P0)
    for number in range(5):
        assert instances(choice(selector, f"r{number}/0")) == (P1 + 1, None)
    selector.remove(P1 + 1)
    assert instances(choice(selector, "last/0")) == (P1, None)


def test_prefill_engines_on_which_one_engine_depends_are_not_all_out() -> None:
    selector = of_roles("prefill", "decode", "aggregated")
    for instance in (P0, P1):
        selector.workers[instance].source.info.backend = "sglang"
    fail_thrice(selector, P0)
    assert selector.health.state(P0) == "healthy"


def test_an_sglang_that_only_prefills_does_not_answer_alone() -> None:
    selector = of_sglang("prefill", "decode")
    with pytest.raises(PipelineError, match="No engine"):
        choice(selector, excluded=[P1])


@pytest.mark.parametrize("backend", ["sglang", "llamacpp"])
def test_who_gets_canaries(backend: str) -> None:
    """Not those that would refuse them."""
    roles: tuple[Role, ...] = ("prefill", "decode", "aggregated")
    selector = of_roles(*roles)
    for worker in selector.workers.values():
        worker.source.info.backend = backend
    selector.health.check(figures(selector.workers, 0.1), 0.1)
    alone = [stands_alone(worker.source) for worker in selector.workers.values()]
    due = selector.health.canaries_due(100.0)
    expected = [False, False, True] if backend == "sglang" else [True] * 3
    assert alone == expected
    assert due == [FIRST + at for at, each in enumerate(alone) if each]


def test_who_gets_no_canaries_is_probed_by_clients_requests() -> None:
    selector = of_sglang("prefill", "prefill", "decode")
    fail_thrice(selector, P0)
    assert selector.health.state(P0) == "quarantined"
    check_for(selector, 3, 1.0)
    assert selector.health.state(P0) == "probing"
    assert selector.health.may_serve(P0)


@pytest.mark.parametrize(
    ("prefill_busy", "decode_busy", "deadline_ms", "comes"),
    [(True, False, 3000.0, False), (True, False, 5000.0, True), (False, True, 3000.0, True)],
)
def test_a_deadline_counts_the_queue_where_the_prompt_is_computed(
    prefill_busy: bool, decode_busy: bool, deadline_ms: float, comes: bool
) -> None:
    selector = of_roles("prefill", "decode")
    for busy, instance in ((prefill_busy, P0), (decode_busy, P1)):
        if busy:
            selector.active.add(
                "before", instance, prefill_tokens=16_000, names=[], own_blocks=1, now=0.0
            )
    admission = Admission(selector, QueueSettings(limits=None))
    wanted = route(LONG, "r/0", hints={"deadline_ms": deadline_ms})
    ticket = admission.offer(wanted, 0.0)
    assert (ticket.refusal is None) is comes


def test_a_short_prompts_deadline_is_the_decode_engines() -> None:
    selector = of_roles("prefill", "decode")
    selector.active.add("before", P0, prefill_tokens=16_000, names=[], own_blocks=1, now=0.0)
    admission = Admission(selector, QueueSettings(limits=None))
    ticket = admission.offer(route([1] * 20, "r/0", hints={"deadline_ms": 100.0}), 0.0)
    assert ticket.refusal is None


def test_a_request_whose_end_nobody_reports_is_no_long_answer() -> None:
    """It expires, and its engine was at work until then, not until the clock's beginning."""
    active = ActiveRequests()
    active.add("r/0", P1, prefill_tokens=0, names=[], own_blocks=1, now=100.0, elsewhere=50)
    active.add("r/0/prefill", P0, prefill_tokens=50, names=[], own_blocks=1, now=100.0)
    active.add("new", P0, prefill_tokens=1, names=[], own_blocks=1, now=2000.0)
    assert list(active.requests) == ["new"]
    assert active.load(P1)._last_end == 2000.0
