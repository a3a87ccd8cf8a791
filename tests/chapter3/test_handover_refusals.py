"""Decode engines that do not begin what a prefill engine has handed over."""

from collections.abc import AsyncIterator
from typing import Any

from chapter3.disaggregation import prefill_id
from common.dispatch import NOT_LISTED
from common.protocol import EngineOutput, ErrorInfo, to_wire
from common.protocol_routing import PrefillChoice, RouteOutput, RouteRequest
from common.protocol_transfer import KvDescriptor
from tests.chapter3.test_routed_stream import DIED, ENOUGH, GONE, FakeEngine, Run

import pytest

FULL = EngineOutput(error=ErrorInfo("overloaded", "the engine is full"))
CLOSED = EngineOutput(error=ErrorInfo("unavailable", "the engine is closed"))
SHUT_DOWN = EngineOutput(finish_reason="cancelled")
HANDED_OVER = EngineOutput([ENOUGH[0]], kv=KvDescriptor("zmq", 3))


def by_way_of_one(*decode: FakeEngine, limit: int = 0, fallback: bool = False) -> Run:
    """A prefill engine, 100, and decode engines from 101 on, the next of which is chosen."""
    run = Run(FakeEngine(0, HANDED_OVER), *decode, limit=limit, fallback=fallback)

    async def answer(wanted: RouteRequest, context: Any) -> AsyncIterator[Any]:
        free = [key for key in run.client.engines if key != 100 and key not in wanted.excluded]
        if free:
            prefill = PrefillChoice(prefill_id(wanted.request_id), 100, 0)
            answered_before = len(wanted.token_ids) > 3
            choice = RouteOutput(free[0], free[0] - 100, reason="the next")
            choice.prefill = None if answered_before else prefill
            yield to_wire(choice)
        else:
            error = ErrorInfo("unavailable", "No engine with the model is ready")
            yield to_wire(RouteOutput(error=error))

    run.router._answer = answer  # type: ignore[method-assign]
    return run


@pytest.mark.parametrize(
    "refusal",
    [FULL, CLOSED, SHUT_DOWN, GONE, f"Unavailable: instance 101 {NOT_LISTED} engine.generate"],
    ids=str,
)
async def test_another_one_is_asked_and_nothing_has_migrated(refusal: str | EngineOutput) -> None:
    """Also where no answer may migrate: of this one nothing was lost."""
    run = by_way_of_one(*(FakeEngine(0, refusal) for _ in range(4)), FakeEngine())
    assert await run() == ENOUGH
    assert run.used == [1] * 6
    assert run.progress.migrations == 0


async def test_each_engine_is_asked_once() -> None:
    run = by_way_of_one(*(FakeEngine(0, FULL) for _ in range(4)))
    assert "after 1 tokens, and no other can go on" in str(await run.fails())
    assert run.used == [1] * 5


@pytest.mark.parametrize("failure", [DIED, EngineOutput(error=ErrorInfo("internal", "a bug"))])
async def test_one_that_fails_at_it_counts(failure: str | EngineOutput) -> None:
    run = by_way_of_one(FakeEngine(0, failure), FakeEngine())
    await run.fails()
    run = by_way_of_one(FakeEngine(0, failure), FakeEngine(), limit=1)
    assert await run() == ENOUGH
    assert run.progress.migrations == 1


async def test_one_that_leaves_after_its_first_token_counts() -> None:
    run = by_way_of_one(FakeEngine(2, CLOSED), FakeEngine())
    assert "the engine is closed" in str(await run.fails())


async def test_without_a_router_refusals_end() -> None:
    """Engines that take turns would be asked for ever."""
    run = by_way_of_one(*(FakeEngine(0, FULL) for _ in range(4)), limit=2, fallback=True)
    run.router.on_ask = lambda: setattr(run.router, "up", len(run.router.asked) < 2)
    run.client._turn = 1
    assert str(await run.fails()) == "the engine is full"
    assert sum(run.used[1:]) == 2 + 3, "chosen by the router, and in turn up to the limit"
