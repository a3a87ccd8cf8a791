"""Which failures of an instance a request survives, and which it must not hide."""

from collections.abc import AsyncIterator
from typing import Any

from common.dispatch import MAX_TRIES, dispatch

import pytest
from dynamo.runtime import Context

REFUSED = Exception("Unavailable: NATS request to ns_engine.generate-1 failed")
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
    "failures", [[REFUSED], [LEFT], [GONE], [[DIED]], [REFUSED, LEFT], [REFUSED, [DIED]]]
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


async def test_tries_are_bounded() -> None:
    instances = Instances(*[REFUSED] * 10)
    with pytest.raises(Exception, match="failed"):
        await collect(instances)
    assert len(instances.answers) == 10 - MAX_TRIES


async def test_a_slow_failure_is_survived_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With NATS away every try takes the runtime's ten seconds."""
    monkeypatch.setattr("common.dispatch.FAST_FAILURE_S", -1.0)
    instances = Instances(*[REFUSED] * 10)
    with pytest.raises(Exception, match="failed"):
        await collect(instances)
    assert len(instances.answers) == 10 - 2


async def test_a_cancelled_request_is_not_tried_again() -> None:
    context = Context("r")
    context.stop_generating()
    instances = Instances([DIED], [1])
    with pytest.raises(ValueError, match="Stream ended"):
        await collect(instances, context)
    assert instances.answers == [[1]]
