"""Which failures of an instance a request survives, and which it must not hide."""

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

from common.dispatch import FAST_FAILURE_S, MAX_REFUSALS, dispatch

import pytest
from dynamo.runtime import Context

REFUSED = Exception("Unavailable: NATS request to ns_engine.generate-1 failed")
REMOVED = Exception(
    "Unavailable: Worker removed before request could be sent (tombstoned instance)"
)
LEFT = Exception("Unavailable: Worker disconnected before response stream was established")
GONE = Exception("Unavailable: instance_id=7 not found for endpoint ns/engine/generate")
DIED = ValueError("Unavailable: Stream ended before generation completed")
NOBODY = Exception("Unavailable: No workers available for endpoint ns/engine/generate")
FAULT = ValueError("Internal: RuntimeError: boom")


class Instances:
    """Answers call after call: an exception before the stream, or the items of one."""

    def __init__(self, *answers: Exception | list[Any]) -> None:
        self.answers = list(answers)

    async def call(self) -> AsyncIterator[Any]:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return self.items(answer)

    async def items(self, answer: list[Any]) -> AsyncIterator[Any]:
        for item in answer:
            if isinstance(item, Exception):
                raise item
            yield item


async def collect(instances: Instances, context: Context | None = None) -> list[Any]:
    return [item async for item in dispatch(instances.call, context or Context("r"))]


@pytest.mark.parametrize(
    "failures",
    [
        [REFUSED],
        [REMOVED],
        [LEFT],
        [GONE],
        [[DIED]],
        [REFUSED] * 4,
        [REFUSED, GONE, LEFT, [DIED], REFUSED, GONE, LEFT],
    ],
)
async def test_another_instance_answers(failures: list[Any]) -> None:
    assert await collect(Instances(*failures, [1, 2])) == [1, 2]


async def test_what_was_seen_is_not_asked_for_again() -> None:
    """A stream that broke off after its first item would repeat text to the client."""
    instances = Instances([1, DIED], [1, 2])
    items = dispatch(instances.call, Context("r"))
    assert await anext(items) == 1
    with pytest.raises(ValueError, match="Stream ended"):
        await anext(items)
    assert len(instances.answers) == 1


@pytest.mark.parametrize("failure", [NOBODY, FAULT, [FAULT], ValueError("InvalidRequest: no")])
async def test_what_another_instance_would_not_help(failure: Any) -> None:
    instances = Instances(failure, [1])
    with pytest.raises(Exception, match=r"No workers|boom|InvalidRequest"):
        await collect(instances)
    assert instances.answers == [[1]]


async def test_a_request_that_kills_does_not_kill_every_instance() -> None:
    instances = Instances([DIED], [DIED], [DIED], [DIED])
    with pytest.raises(ValueError, match="Stream ended"):
        await collect(instances)
    assert len(instances.answers) == 2


async def test_refusals_are_bounded() -> None:
    instances = Instances(*[REFUSED] * 2 * MAX_REFUSALS)
    with pytest.raises(Exception, match="failed"):
        await collect(instances)
    assert len(instances.answers) == MAX_REFUSALS


async def test_a_slow_failure_is_survived_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With NATS away every try takes the runtime's ten seconds."""
    monkeypatch.setattr("common.dispatch.FAST_FAILURE_S", -1.0)
    instances = Instances(*[REFUSED] * 10)
    with pytest.raises(Exception, match="failed"):
        await collect(instances)
    assert len(instances.answers) == 10 - 2


async def test_a_death_and_then_a_slow_failure_are_survived(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two instances died at about the same time."""
    monkeypatch.setattr("common.dispatch.FAST_FAILURE_S", -1.0)
    assert await collect(Instances([DIED], REFUSED, [1])) == [1]


async def test_a_cancelled_request_is_not_tried_again() -> None:
    context = Context("r")
    context.stop_generating()
    instances = Instances([DIED], [1])
    with pytest.raises(ValueError, match="Stream ended"):
        await collect(instances, context)
    assert instances.answers == [[1]]


async def test_the_choice_knows_the_failure_and_may_take_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("common.dispatch.time", SimpleNamespace(monotonic=lambda: clock.now))
    failures: list[Exception | None] = []

    async def choose(failure: Exception | None) -> None:
        failures.append(failure)
        clock.now += 2 * FAST_FAILURE_S

    instances = Instances(REFUSED, LEFT, REFUSED, [1])
    items = dispatch(instances.call, Context("r"), choose)
    assert [item async for item in items] == [1]
    assert failures == [None, REFUSED, LEFT, REFUSED]


async def test_no_choice_is_the_end() -> None:
    async def choose(failure: Exception | None) -> None:
        if failure is not None:
            raise ValueError("none left")

    instances = Instances(REFUSED, [1])
    with pytest.raises(ValueError, match="none left"):
        await anext(dispatch(instances.call, Context("r"), choose))
    assert instances.answers == [[1]]
