"""Canary requests: an engine that nobody uses is found sick, and well again."""

import argparse
import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import chapter3.canary
import chapter3.engine_record
from chapter3.canary import add_health_arguments, watching_health
from chapter3.selector import Selector
from common.protocol import EngineOutput, ErrorInfo, GenerateRequest, from_wire, to_wire
from tests.chapter1.helpers import eventually
from tests.chapter3.fleet import FIRST, fleet, route

import pytest
from dynamo.runtime import Client, Context

SECOND = FIRST + 1


class FakeEngines:
    """The client of the engines; what they do is `error`, `hang` or `unlisted`, by instance."""

    def __init__(self) -> None:
        self.does: dict[int, str] = {}
        self.asked: list[int] = []
        self.open = 0
        self.read_to_the_end = 0
        self.released = asyncio.Event()

    async def direct(
        self, request: Any, instance: int, *, annotated: bool, context: Context
    ) -> AsyncIterator[Any]:
        wanted = from_wire(request, GenerateRequest)
        assert (len(wanted.token_ids), wanted.sampling.max_tokens) == (4, 2)
        self.asked.append(instance)
        if self.does.get(instance) == "unlisted":
            raise ValueError(f"Unavailable: {instance} not found for endpoint")
        return self._answer(instance)

    async def _answer(self, instance: int) -> AsyncIterator[Any]:
        self.open += 1
        if self.does.get(instance) == "hang":
            await self.released.wait()
        if self.does.get(instance) == "error":
            yield to_wire(EngineOutput(error=ErrorInfo("internal", "out of order")))
        else:
            yield to_wire(EngineOutput([5]))
            yield to_wire(EngineOutput([6], finish_reason="length"))
        self.read_to_the_end += 1


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A router that looks often."""
    monkeypatch.setattr(chapter3.canary, "CHECK_INTERVAL_S", 0.01)
    for name in ("IDLE_CANARY_INTERVAL_S", "SUSPECT_CANARY_INTERVAL_S", "PROBE_INTERVAL_S",
                 "QUARANTINE_S", "RETRY_S", "MIN_OVERDUE_S", "OVERDUE_RATIO"):  # fmt: skip
        monkeypatch.setattr(chapter3.engine_record, name, 0.05)


@asynccontextmanager
async def watched(engines: FakeEngines) -> AsyncIterator[Selector]:
    """Two idle engines that always have just been heard of."""
    selector = fleet("round_robin")
    for worker in selector.workers.values():
        worker.heard = float("inf")
    failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
    async with watching_health(cast(Client, engines), selector, failed):
        yield selector
        assert not failed.done()


async def test_an_engine_that_only_gives_errors_is_found_without_a_client_and_forgiven() -> None:
    engines = FakeEngines()
    engines.does = {SECOND: "error"}
    async with watched(engines) as selector:
        await eventually(lambda: selector.health.state(SECOND) == "quarantined")
        assert selector.health.state(FIRST) == "healthy"
        assert {selector.select(route([1] * 8), 0.0).worker.instance_id for _ in range(4)} == {
            FIRST
        }
        engines.does = {}
        await eventually(lambda: selector.health.state(SECOND) == "healthy")
    assert engines.open == engines.read_to_the_end


async def test_a_hung_engine_has_one_canary_at_a_time_which_is_never_dropped() -> None:
    engines = FakeEngines()
    engines.does = {SECOND: "hang"}
    async with watched(engines) as selector:
        await eventually(lambda: selector.health.state(SECOND) == "quarantined")
        assert "no first token for" in selector.health.why(SECOND)
        before = engines.asked.count(FIRST)
        await eventually(lambda: engines.asked.count(FIRST) > before + 3)
        assert engines.asked.count(SECOND) == 1
        assert engines.open == engines.read_to_the_end + 1
        engines.does = {}
        engines.released.set()
        await eventually(lambda: selector.health.state(SECOND) == "healthy")
        await eventually(lambda: engines.open == engines.read_to_the_end)


async def test_an_engine_that_our_client_does_not_list_is_not_sick_for_that() -> None:
    engines = FakeEngines()
    engines.does = {SECOND: "unlisted"}
    async with watched(engines) as selector:
        await eventually(lambda: engines.asked.count(SECOND) > 6)
        assert selector.health.state(SECOND) == "healthy"


async def test_canaries_are_no_load_and_nothing_is_left_of_them() -> None:
    engines = FakeEngines()
    async with watched(engines) as selector:
        await eventually(lambda: len(engines.asked) > 20)
        assert selector.active.requests == {}
        assert all(len(engine.sent) <= 1 for engine in selector.health.engines.values())


async def test_engines_that_leave_end_their_canaries() -> None:
    engines = FakeEngines()
    engines.does = {SECOND: "hang"}
    async with watched(engines) as selector:
        await eventually(lambda: SECOND in engines.asked)
        selector.remove(SECOND)
        await eventually(lambda: SECOND not in selector.health.engines)


@pytest.mark.parametrize("text", ["1", "0.5", "-3", "three", "nan"])
def test_a_slow_ratio_that_makes_no_sense_is_refused(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    add_health_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--slow-ratio", text])
    assert "is not a number above 1" in capsys.readouterr().err
