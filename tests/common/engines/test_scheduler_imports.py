"""What the scheduler does with KV that another engine computed."""

from dataclasses import dataclass
from typing import Any

from common.engines.scheduled_request import ScheduledRequest
from common.engines.scheduler import Scheduler
from tests.common.engines.test_scheduler import (
    BLOCK,
    CHUNK,
    RUNNING,
    FakeModel,
    a_request,
    expected_output,
)

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

PROMPT = [n % 3 for n in range(21)]  # five blocks and one token


@dataclass(frozen=True)
class Received:
    first: int
    tokens: int


def importing(import_blocks: int = 2) -> FakeModel:
    model = FakeModel()
    model.scheduler = Scheduler(
        model.cache,
        max_running=RUNNING,
        max_waiting=1000,
        prefill_chunk=CHUNK,
        import_blocks=import_blocks,
    )
    return model


def handed_over(
    first: int, tokens: int, prompt: list[int] = PROMPT, **sampling: Any
) -> ScheduledRequest:
    """A request whose KV from block `first` to token `tokens` has come."""
    request = a_request(prompt, **{"max_tokens": 3, **sampling})
    request.received = Received(first, tokens)
    return request


def plans(model: FakeModel) -> list[list[tuple[int | None, int, bool]]]:
    """Of every step until all is done: the received block's number, the tokens, if it samples."""
    steps = []
    while not model.scheduler.is_idle:
        work = model.scheduler.plan()
        steps.append([(item.received, len(item.tokens), item.sample) for item in work])
        model.step()
    return steps


def test_some_blocks_a_step_are_taken_over_and_with_the_last_a_token_is_computed() -> None:
    model = importing()
    request = handed_over(0, 20)
    model.scheduler.add(request)
    steps = plans(model)
    assert steps[:3] == [
        [(0, BLOCK, False), (1, BLOCK, False)],
        [(2, BLOCK, False), (3, BLOCK, False)],
        [(4, BLOCK, False), (None, 1, True)],
    ]
    assert request.output == expected_output(PROMPT, 3)
    assert model.scheduler.metrics().received_tokens == 20
    assert request.received is None, "its memory is free"


def test_a_partial_block_is_taken_over() -> None:
    model = importing(9)
    model.scheduler.add(handed_over(0, 18))
    assert plans(model)[:2] == [
        [(0, 4, False), (1, 4, False), (2, 4, False), (3, 4, False), (4, 2, False)],
        [(None, 3, True)],
    ]


def test_others_decode_meanwhile() -> None:
    model = importing(1)
    decoding = a_request([1, 2], max_tokens=20)
    model.scheduler.add(decoding)
    model.step()
    model.scheduler.add(handed_over(0, 20))
    for block in range(4):
        work = model.scheduler.plan()
        assert [(item.request is decoding, item.received) for item in work] == [
            (False, block),
            (True, None),
        ]
        model.step()
    assert decoding.output_length == 5


def test_the_limit_is_that_of_all_requests_together() -> None:
    model = importing(3)
    model.scheduler.add(handed_over(0, 20))
    model.scheduler.add(handed_over(0, 20, [2, *PROMPT[1:]]))
    (first, second) = model.scheduler.running
    work = model.scheduler.plan()
    assert [item.request for item in work] == [first] * 3
    model.step()
    work = model.scheduler.plan()
    assert [item.request for item in work] == [first, first, second, first]


def test_what_is_missing_before_the_received_blocks_is_computed() -> None:
    """They follow blocks that were cached when they were fetched, and were evicted since."""
    model = importing(9)
    request = handed_over(3, 20)
    model.scheduler.add(request)
    steps = plans(model)
    assert steps[:3] == [
        [(None, CHUNK, False)],
        [(None, 3 * BLOCK - CHUNK, False)],
        [(3, BLOCK, False), (4, BLOCK, False), (None, 1, True)],
    ]
    assert request.output == expected_output(PROMPT, 3)


def test_blocks_that_are_cached_meanwhile_are_not_taken_over() -> None:
    model = importing(9)
    model.scheduler.add(a_request(PROMPT[:17], max_tokens=1))
    while not model.scheduler.is_idle:
        model.step()
    request = handed_over(0, 20)
    model.scheduler.add(request)
    assert plans(model)[0] == [(4, BLOCK, False), (None, 1, True)]
    assert request.cached_tokens == 16


def test_after_a_bad_block_the_rest_is_computed() -> None:
    model = importing(1)
    request = handed_over(0, 20)
    model.scheduler.add(request)
    model.step()
    request.received = None  # as the engine does
    assert plans(model)[0] == [(None, CHUNK, False)]
    assert request.output == expected_output(PROMPT, 3)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_request_that_is_preempted_takes_over_what_it_lost(steps: int) -> None:
    model = importing(1)
    request = handed_over(0, 20)
    model.scheduler.add(request)
    for _ in range(steps):
        model.step()
    model.scheduler._preempt(request)
    model.scheduler.cache.clear()
    assert plans(model)[0] == [(0, BLOCK, False)]
    assert request.output == expected_output(PROMPT, 3)


@settings(max_examples=80, deadline=None, database=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 1), min_size=2, max_size=40),
            st.integers(0, 9),  # the first block received
            st.integers(1, 39),  # and the token up to which
            st.integers(1, 8),  # max_tokens
            st.integers(0, 4),  # steps to wait before it comes
        ),
        max_size=8,
    )
)
def test_every_answer_is_right_whatever_was_received(
    load: list[tuple[list[int], int, int, int, int]],
) -> None:
    """In a pool for about one request: preemption and eviction all the time."""
    model = importing()
    requests = []
    for prompt, first, tokens, max_tokens, wait in load:
        for _ in range(wait):
            model.step()
        request = a_request(prompt, max_tokens=max_tokens)
        if first * BLOCK < min(tokens, len(prompt) - 1):
            request.received = Received(first, min(tokens, len(prompt) - 1))
        requests.append((request, prompt))
        model.scheduler.add(request)
    for _ in range(2000):
        if model.scheduler.is_idle:
            break
        model.step()
    assert model.scheduler.is_idle
    for request, prompt in requests:
        assert request.output == expected_output(prompt, request.max_tokens)
    model.cache.clear()
    assert model.cache.free_cells == model.cache.cells
