"""The requests under way: what each engine has still to do, whatever is reported in which order."""

import random
from collections import Counter

from chapter3.active import EXPIRE_S, ActiveRequests
from chapter3.engine_load import EngineLoad

import pytest
from hypothesis import given
from hypothesis import strategies as st

ONE, TWO = 101, 102


def add(
    active: ActiveRequests,
    request_id: str,
    instance: int = ONE,
    *,
    tokens: int = 100,
    names: list[int] | None = None,
    own: int = 2,
    now: float = 0.0,
) -> None:
    active.add(
        request_id, instance, prefill_tokens=tokens, names=names or [], own_blocks=own, now=now
    )


def figures(load: EngineLoad) -> tuple[int, int, int, int]:
    return (load.prefill_tokens, load.prefill_requests, load.decode_requests, load.active_blocks)


NOTHING = (0, 0, 0, 0)


def test_the_life_of_a_request() -> None:
    active = ActiveRequests()
    load = active.load(ONE)
    add(active, "a", tokens=100, names=[1, 2, 3], own=2)
    assert figures(load) == (100, 1, 0, 5)
    active.first_token("a", 1.0)
    assert figures(load) == (0, 0, 1, 5)
    active.first_token("a", 2.0)  # told twice
    assert figures(load) == (0, 0, 1, 5)
    active.finish("a")
    active.finish("a")
    active.first_token("a", 3.0)
    assert figures(load) == NOTHING
    assert not active.requests


def test_a_request_that_ends_without_a_first_token_leaves_nothing() -> None:
    active = ActiveRequests()
    add(active, "a", names=[1])
    active.finish("a")
    assert figures(active.load(ONE)) == NOTHING
    assert active.load(ONE).prefill_s(9.0) == 0.0


def test_shared_blocks_count_once_until_the_last_one_ends() -> None:
    active = ActiveRequests()
    load = active.load(ONE)
    add(active, "a", names=[1, 2, 3], own=1)
    add(active, "b", names=[1, 2, 4, 5], own=1)
    assert (load.active_blocks, load.prompt_blocks) == (7, 5)
    active.finish("a")
    assert (load.active_blocks, load.prompt_blocks) == (5, 4)
    active.finish("b")
    assert (load.active_blocks, load.prompt_blocks) == (0, 0)


@pytest.mark.parametrize(
    ("names", "new"),
    [([], 0), ([9], 1), ([1], 0), ([1, 2, 3], 0), ([1, 2, 3, 4], 1), ([1, 8, 9], 2), ([7, 8], 2)],
)
def test_what_a_prompt_would_add(names: list[int], new: int) -> None:
    active = ActiveRequests()
    add(active, "a", names=[1, 2, 3])
    assert active.load(ONE).new_prompt_blocks(names) == new
    assert active.load(TWO).new_prompt_blocks(names) == len(names)


def test_an_id_that_is_used_again_replaces_the_first() -> None:
    active = ActiveRequests()
    add(active, "a", ONE, names=[1])
    add(active, "a", TWO, names=[1])
    assert figures(active.load(ONE)) == NOTHING
    assert active.load(TWO).prefill_requests == 1


def test_an_engine_that_left_takes_its_requests_along() -> None:
    active = ActiveRequests()
    add(active, "a", ONE)
    add(active, "b", TWO)
    active.remove_instance(ONE)
    active.first_token("a", 1.0)
    active.finish("a")
    assert list(active.requests) == ["b"]
    assert figures(active.load(ONE)) == NOTHING
    assert active.load(TWO).prefill_requests == 1


def test_requests_whose_end_nobody_tells_expire() -> None:
    active = ActiveRequests()
    for number in range(1000):
        add(active, f"r{number}", names=[number], now=float(number))
        assert len(active.requests) <= EXPIRE_S + 1
    add(active, "last", own=1, now=1000 + EXPIRE_S + 1)
    assert list(active.requests) == ["last"]
    assert figures(active.load(ONE)) == (100, 1, 0, 1)


def test_the_rate_of_prefill_is_learned() -> None:
    """Prompts of 1,000 tokens take half a second each, one after the other."""
    active = ActiveRequests()
    now = 0.0
    for number in range(60):
        add(active, f"r{number}", tokens=1000, now=now)
        now += 0.5
        active.first_token(f"r{number}", now)
        active.finish(f"r{number}")
    assert active.load(ONE).prefill_tokens_per_s == pytest.approx(2000, rel=0.05)


def test_a_queue_of_prompts_is_measured_one_by_one() -> None:
    """All were sent at once: the time that one waited is not the time that it took."""
    active = ActiveRequests()
    for number in range(60):
        add(active, f"r{number}", tokens=1000, now=0.0)
    for number in range(60):
        active.first_token(f"r{number}", 0.5 * (number + 1))
    assert active.load(ONE).prefill_tokens_per_s == pytest.approx(2000, rel=0.05)


def test_first_tokens_that_are_told_together_are_measured_together() -> None:
    """Eight prompts of 500 tokens are computed in half a second, as one batch or nearly so."""
    active = ActiveRequests()
    for batch in range(10):
        names = [f"r{batch}/{number}" for number in range(8)]
        for name in names:
            add(active, name, tokens=500, now=0.5 * batch)
        for number, name in enumerate(names):
            active.first_token(name, 0.5 * (batch + 1) + number * 1e-6)
    assert 5000 < active.load(ONE).prefill_tokens_per_s < 12000


def test_the_time_that_prefill_will_take_passes() -> None:
    active = ActiveRequests()
    load = active.load(ONE)
    rate = load.prefill_tokens_per_s
    add(active, "a", tokens=round(rate), now=10.0)
    add(active, "b", tokens=round(2 * rate), now=10.0)
    assert load.prefill_s(10.0) == pytest.approx(3.0)
    assert load.prefill_s(10.5) == pytest.approx(2.5)
    assert load.prefill_s(99.0) >= 2.0, "the second begins when the first is done"
    active.finish("a")
    active.finish("b")
    assert load.prefill_s(99.0) == 0.0


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "first_token", "finish", "remove_instance"]),
        st.integers(0, 5),  # the request
        st.sampled_from([ONE, TWO]),
        st.integers(0, 200),  # tokens
        st.integers(0, 4),  # a prompt is 1, 2, ... of a common prefix and blocks of its own
        st.floats(0, 400),  # seconds that pass
    ),
    max_size=60,
)


@given(STEPS)
def test_the_books_balance_after_any_life(
    steps: list[tuple[str, int, int, int, int, float]],
) -> None:
    active, now = ActiveRequests(), 0.0
    for step, number, instance, tokens, length, passed in steps:
        now += passed
        request_id = f"r{number}"
        if step == "add":
            names = [*range(length), *range(10 * number, 10 * number + 2)]
            add(active, request_id, instance, tokens=tokens, names=names, own=length, now=now)
        elif step == "first_token":
            active.first_token(request_id, now)
        elif step == "finish":
            active.finish(request_id)
        else:
            active.remove_instance(instance)
        for engine in (ONE, TWO):
            load = active.load(engine)
            here = [request for request in active.requests.values() if request.instance == engine]
            waiting = [request for request in here if request.in_prefill]
            assert load.prefill_tokens == sum(request.prefill_tokens for request in waiting)
            assert load.prefill_requests == len(waiting)
            assert load.decode_requests == len(here) - len(waiting)
            shared = Counter(name for request in here for name in request.names)
            assert load.prompt_blocks == len(shared)
            own = sum(request.own_blocks for request in here)
            assert load.active_blocks == len(shared) + own
            assert load.prefill_s(now) >= 0.0
            assert load.prefill_tokens_per_s > 0.0


def test_a_long_life_leaves_nothing_behind() -> None:
    active, rng, now = ActiveRequests(), random.Random(0), 0.0
    for number in range(5000):
        now += rng.random()
        first = rng.randrange(50)
        add(active, f"r{number}", rng.choice([ONE, TWO]), names=[first, first + 100], now=now)
        for request_id in rng.sample(list(active.requests), min(2, len(active.requests))):
            if rng.random() < 0.5:
                active.first_token(request_id, now)
            else:
                active.finish(request_id)
    for request_id in list(active.requests):
        active.finish(request_id)
    for instance in (ONE, TWO):
        assert figures(active.load(instance)) == NOTHING
        assert not active.load(instance)._shared
        assert not active.load(instance)._prefills


def test_to_wait_for_a_place_is_not_to_compute_slowly() -> None:
    """An engine that runs one request at a time: the next one's prompt is computed after it."""
    active = ActiveRequests()
    for number in range(20):
        at, name = 10.0 * number, f"{number}"
        active.add(name, 1, prefill_tokens=800, names=[], own_blocks=1, now=at, waits=number > 0)
        if number:
            active.finish(f"{number - 1}", at + 9.9)
        active.first_token(name, at + (10.0 if number else 0.1))
    assert active.load(1).measured_tokens_per_s == pytest.approx(8000, rel=0.3)


def test_requests_that_the_engine_long_has_not_had_are_forgotten() -> None:
    """A processor that was killed reports no ends; the engine's own count tells."""
    active = ActiveRequests()
    for number in range(3):
        active.add(str(number), 1, prefill_tokens=10, names=[], own_blocks=1, now=float(number))
        active.first_token(str(number), float(number))
    assert active.reconcile(1, 1, 10.0) == []
    assert active.reconcile(1, 2, 12.0) == []
    assert active.reconcile(1, 1, 14.9) == []
    assert active.reconcile(1, 1, 15.0) == ["0"], "one was missing all the time, the oldest"
    assert active.load(1).decode_requests == 2


def test_a_request_on_its_way_to_the_engine_is_not_forgotten() -> None:
    active = ActiveRequests()
    for second in range(20):
        active.add(str(second), 1, prefill_tokens=10, names=[], own_blocks=1, now=float(second))
        assert active.reconcile(1, second, second + 0.1) == []
        assert active.reconcile(1, second + 1, second + 0.2) == []
    assert len(active.requests) == 20
