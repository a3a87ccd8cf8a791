import zlib
from typing import Any

from common.engines.block_cache import BlockCache
from common.engines.scheduled_request import ScheduledRequest, schedule
from common.engines.scheduler import Scheduler
from common.kv import KvEvent
from common.protocol import GenerateRequest, PipelineError, SamplingParams
from tests.common.engines.cache_driver import FakeMemory, check_cache
from tests.common.engines.engine_helpers import FakeContext

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

CELLS, BLOCK, CHUNK, RUNNING, IDS = 48, 4, 8, 4, 5


def a_request(
    prompt: list[int], context: FakeContext | None = None, **sampling: Any
) -> ScheduledRequest:
    return schedule(
        GenerateRequest(prompt, SamplingParams(**sampling)),
        context or FakeContext(),
        context_length=CELLS,
        vocab_size=100,
        eog_ids=frozenset(),
    )


class FakeModel:
    """A scheduler over a fake memory; a token depends on all tokens that its KV depends on."""

    def __init__(self, max_waiting: int = 1000) -> None:
        self.memory = FakeMemory(CELLS)
        self.cache = BlockCache(self.memory, cells=CELLS, block_size=BLOCK, max_sequences=IDS)
        self.events: list[KvEvent] = []
        self.cache.subscribe(self.events.extend)
        self.scheduler = Scheduler(
            self.cache, max_running=RUNNING, max_waiting=max_waiting, prefill_chunk=CHUNK
        )
        self.ended: dict[ScheduledRequest, str] = {}
        self.preempted = False

    def step(self) -> None:
        for request in self.scheduler.drop_stopped():
            self.end(request, "cancelled")
        work = self.scheduler.plan()
        computed = [item for item in work if item.received is None]
        prefills = [item for item in computed if len(item.tokens) > 1]
        assert sum(len(item.tokens) for item in prefills) <= CHUNK
        assert len(computed) - len(prefills) <= RUNNING
        self.preempted |= any(r.started is not None for r in self.scheduler.waiting)
        for item in work:
            self.memory.write(item.sequence.id, len(item.sequence.tokens), item.tokens)
            self.scheduler.computed([item])
        for item in work:
            if item.sample:
                prefix = self.memory.content(item.sequence.id)[len(item.request.tokens) - 1]
                reason = self.scheduler.add_output(item.request, next_token(prefix))
                if reason is not None:
                    self.scheduler.finish(item.request)
                    self.end(item.request, reason)

    def end(self, request: ScheduledRequest, reason: str) -> None:
        assert request not in self.ended, "answered twice"
        self.ended[request] = reason


def next_token(prefix: tuple[int, ...]) -> int:
    return zlib.crc32(bytes(prefix)) % 3


def expected_output(prompt: list[int], count: int) -> list[int]:
    tokens = tuple(prompt)
    for _ in range(count):
        tokens += (next_token(tokens),)
    return list(tokens[len(prompt) :])


arrivals = st.lists(
    st.tuples(
        st.integers(0, 5),  # steps to wait before it comes
        st.lists(st.integers(0, 1), min_size=1, max_size=CELLS - 8),
        st.integers(1, 8),  # max_tokens
        st.none() | st.integers(0, 12),  # steps after which it is cancelled
    ),
    max_size=12,
)


@settings(max_examples=150, deadline=None, database=None)
@given(arrivals)
def test_every_request_is_answered_once_and_right_whatever_the_load(
    load: list[tuple[int, list[int], int, int | None]],
) -> None:
    """The pool holds about one request: admission, preemption and eviction all the time."""
    model = FakeModel()
    cancel: list[tuple[int, FakeContext]] = []
    requests: list[tuple[ScheduledRequest, FakeContext]] = []
    now = 0

    def step() -> None:
        nonlocal now
        now += 1
        for when, context in cancel:
            if when <= now:
                context.stop()
        model.step()
        check_cache(model.cache, model.memory, model.events, IDS)

    for wait, prompt, max_tokens, cancel_after in load:
        for _ in range(wait):
            step()
        context = FakeContext()
        request = a_request(prompt, context, max_tokens=max_tokens)
        requests.append((request, context))
        if cancel_after is not None:
            cancel.append((now + cancel_after, context))
        model.scheduler.add(request)
    while not model.scheduler.is_idle:
        step()
        assert now < 2000, "no progress"
    assert set(model.ended) == {request for request, _ in requests}
    for request, context in requests:
        output = request.tokens[request.prompt_length :]
        prompt = request.tokens[: request.prompt_length]
        assert output == expected_output(prompt, len(output))
        if model.ended[request] == "length":
            assert len(output) == request.max_tokens
        else:
            assert context.is_stopped()
    model.cache.clear()
    assert model.cache.free_cells == CELLS


def test_a_pool_too_small_for_the_outputs_preempts_and_loses_nothing() -> None:
    model = FakeModel()
    requests = [a_request([n], max_tokens=40) for n in range(3)]
    for request in requests:
        model.scheduler.add(request)
    while not model.scheduler.is_idle:
        model.step()
    assert model.preempted
    for n, request in enumerate(requests):
        assert request.tokens == [n, *expected_output([n], 40)]


def test_who_came_last_is_preempted_and_goes_on_before_later_ones() -> None:
    model = FakeModel()
    first, second = (a_request([n] * 9, max_tokens=39) for n in range(2))
    model.scheduler.add(first)
    model.scheduler.add(second)
    later = a_request([2] * 40, max_tokens=8)
    model.scheduler.add(later)
    while not model.preempted:
        model.step()
    assert list(model.scheduler.running) == [first]
    assert list(model.scheduler.waiting) == [second, later]
    while not model.scheduler.is_idle:
        model.step()
    assert list(model.ended) == [first, second, later]


def test_decodes_come_before_prefill_and_prefill_in_chunks_first_come_first_served() -> None:
    model = FakeModel()
    decoding, first, second = (a_request([n] * n, max_tokens=8) for n in (2, 12, 9))
    model.scheduler.add(decoding)
    model.step()
    model.scheduler.add(first)
    model.scheduler.add(second)
    plans = []
    for _ in range(3):
        plan = model.scheduler.plan()
        plans.append([(item.request, len(item.tokens)) for item in plan])
        model.step()
    assert plans[0] == [(decoding, 1), (first, 8)]
    assert plans[1] == [(decoding, 1), (first, 4), (second, 4)]
    assert plans[2] == [(decoding, 1), (first, 1), (second, 5)]


def test_requests_that_come_together_compute_their_common_prefix_once() -> None:
    model = FakeModel()
    prefix = [1, 2, 3, 4] * 4
    requests = [a_request([*prefix, 50 + n], max_tokens=1) for n in range(4)]
    for request in requests:
        model.scheduler.add(request)
    steps = 0
    while not model.scheduler.is_idle:
        model.step()
        steps += 1
    assert [request.cached_tokens for request in requests] == [0, 16, 16, 16]
    assert model.scheduler.metrics().cached_tokens == 48
    assert steps == 3


def test_a_full_queue_refuses_the_newest_and_keeps_the_others() -> None:
    model = FakeModel(max_waiting=2)
    accepted = [a_request([n], max_tokens=2) for n in range(RUNNING + 2)]
    for request in accepted:
        model.scheduler.add(request)
    refused = a_request([9], max_tokens=2)
    with pytest.raises(PipelineError, match="4 requests running and 2 waiting") as caught:
        model.scheduler.add(refused)
    assert caught.value.info.kind == "overloaded"
    while not model.scheduler.is_idle:
        model.step()
    assert set(model.ended) == set(accepted)


def test_an_idle_engine_without_a_queue_takes_a_request() -> None:
    model = FakeModel(max_waiting=0)
    model.scheduler.add(a_request([1], max_tokens=1))
    model.step()
    assert list(model.ended.values()) == ["length"]


def test_cancelling_frees_within_one_step() -> None:
    model = FakeModel()
    context = FakeContext()
    for request in (a_request([1] * 20, context), a_request([2] * 40, context)):
        model.scheduler.add(request)
    model.step()
    context.stop()
    model.step()
    assert list(model.ended.values()) == ["cancelled", "cancelled"]
    assert model.scheduler.metrics().used_blocks == 0


def test_metrics_count_what_runs_and_what_was_cached() -> None:
    model = FakeModel()
    model.scheduler.add(a_request([1] * 9, max_tokens=2))
    model.step()
    model.step()
    metrics = model.scheduler.metrics()
    assert (metrics.running, metrics.waiting, metrics.used_blocks) == (1, 0, 3)
    model.step()
    model.scheduler.add(a_request([1] * 9, max_tokens=1))
    while not model.scheduler.is_idle:
        model.step()
    metrics = model.scheduler.metrics()
    assert (metrics.prompt_tokens, metrics.cached_tokens, metrics.output_tokens) == (18, 8, 3)
    assert (metrics.running, metrics.used_blocks, metrics.total_blocks) == (0, 0, 12)


@pytest.mark.parametrize(
    ("prompt", "sampling", "message", "param"),
    [
        ([], {}, "the prompt is empty", "token_ids"),
        ([1] * 48, {}, r"has 48 tokens, but the context length is 48", "token_ids"),
        ([1] * 40, {"max_tokens": 9}, r"max_tokens is 9.*40 tokens.*48.*from 1 to 8", "max_tokens"),
        ([1], {"max_tokens": 0}, r"max_tokens is 0.*from 1 to 47", "max_tokens"),
        ([1], {"max_tokens": 5, "min_tokens": 6}, "min_tokens is 6.*from 0 to 5", "min_tokens"),
        ([1, 100], {}, "token_ids has 100; token ids are from 0 to 99", "token_ids"),
        ([1], {"stop_token_ids": [-1]}, "stop_token_ids has -1", "stop_token_ids"),
        ([1], {"logit_bias": [(1000, 1.0)]}, "logit_bias has 1000", "logit_bias"),
        ([1], {"logprobs": 101}, "logprobs is 101.*from 0 to 100", "logprobs"),
    ],
)
def test_what_does_not_fit_is_refused_with_both_numbers(
    prompt: list[int], sampling: dict[str, Any], message: str, param: str
) -> None:
    with pytest.raises(PipelineError, match=message) as caught:
        a_request(prompt, **sampling)
    assert (caught.value.info.kind, caught.value.info.param) == ("invalid_request", param)


def test_without_max_tokens_the_room_that_is_left_is_the_limit() -> None:
    assert a_request([1] * 40).max_tokens == 8
