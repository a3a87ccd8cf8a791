"""Reports to the router: in batches, in order, and nobody waits for them."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any, cast

import chapter3.router_client
from chapter3.reports import Attempt, Reporter, reporting
from common.protocol import from_wire
from common.protocol_routing import RequestReport, RequestReports
from tests.chapter1.helpers import eventually

import pytest
from dynamo.runtime import Client, Context


class FakeRouter:
    """Takes batches while it is `open`; answers the first `failing` ones with an error."""

    def __init__(self, *, instances: int = 1, failing: int = 0) -> None:
        self.instances = instances
        self.failing = failing
        self.open = asyncio.Event()
        self.open.set()
        self.asked = 0
        self.batches: list[list[RequestReport]] = []

    def instance_ids(self) -> list[int]:
        return list(range(self.instances))

    async def round_robin(
        self, request: Any, *, annotated: bool, context: Context
    ) -> AsyncIterator[Any]:
        self.asked += 1
        await self.open.wait()
        if self.asked <= self.failing:
            raise ValueError("Unavailable: it is gone")
        self.batches.append(from_wire(request, RequestReports).reports)
        return self._answer()

    async def _answer(self) -> AsyncIterator[Any]:
        yield {}

    @property
    def ids(self) -> list[list[str]]:
        return [[report.request_id for report in batch] for batch in self.batches]


def as_client(router: FakeRouter) -> Client:
    return cast(Client, router)


def first_token(number: int) -> RequestReport:
    return RequestReport(f"r{number}", 7, "first_token", ms=1.0)


async def test_what_comes_while_a_batch_is_under_way_is_the_next_one() -> None:
    router = FakeRouter()
    async with reporting(as_client(router)) as reporter:
        router.open.clear()
        reporter.add(first_token(0))
        await eventually(lambda: router.asked == 1)
        for number in range(1, 1000):
            reporter.add(first_token(number))
        router.open.set()
        await eventually(lambda: len(router.batches) == 2)
    assert router.ids == [["r0"], [f"r{number}" for number in range(1, 1000)]]


async def test_draining_waits_for_the_attempts_under_way_and_their_reports() -> None:
    router = FakeRouter()
    async with reporting(as_client(router)) as reporter:
        await reporter.drain()  # nothing to wait for
        attempts = [Attempt(reporter, f"r{number}", 7) for number in range(2)]
        drained = asyncio.create_task(reporter.drain())
        attempts[0].end("finished")
        await eventually(lambda: router.batches)
        assert not drained.done()
        router.open.clear()
        attempts[1].end("failed")
        await eventually(lambda: router.asked == 2)
        assert not drained.done()
        router.open.set()
        await drained
        assert router.ids == [["r0"], ["r1"]]


async def test_draining_gives_up_a_router_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chapter3.router_client, "ROUTER_ANSWER_S", 0.05)
    router = FakeRouter()
    router.open.clear()
    async with reporting(as_client(router)) as reporter:
        Attempt(reporter, "r0", 7).end("finished")
        await reporter.drain()
    assert not router.batches


async def test_with_no_router_reports_are_dropped_and_later_ones_arrive() -> None:
    router = FakeRouter(instances=0)
    async with reporting(as_client(router)) as reporter:
        reporter.add(first_token(0))
        await eventually(lambda: not reporter._waiting)
        assert router.asked == 0
        router.instances = 1
        reporter.add(first_token(1))
        await eventually(lambda: router.batches)
    assert router.ids == [["r1"]]


async def test_a_router_that_fails_costs_its_batch_alone(caplog: pytest.LogCaptureFixture) -> None:
    router = FakeRouter(failing=1)
    with caplog.at_level(logging.WARNING):
        async with reporting(as_client(router)) as reporter:
            reporter.add(first_token(0))
            await eventually(lambda: router.asked == 1)
            reporter.add(first_token(1))
            await eventually(lambda: router.batches)
    assert router.ids == [["r1"]]
    assert "1 reports did not reach the router" in caplog.text
    assert "it is gone" in caplog.text


async def test_a_router_that_hangs_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Else all reports from then on would wait in memory."""
    monkeypatch.setattr(chapter3.router_client, "ROUTER_ANSWER_S", 0.05)
    router = FakeRouter()
    router.open.clear()
    with caplog.at_level(logging.WARNING):
        async with reporting(as_client(router)) as reporter:
            for number in range(3):
                reporter.add(first_token(number))
                await eventually(lambda: not reporter._waiting)
                await eventually(lambda: "did not answer within" in caplog.text)
                caplog.clear()
    assert router.batches == []


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 50.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(chapter3.reports, "time", clock)
    return clock


def test_an_attempt_tells_its_first_token_and_its_end(clock: Clock) -> None:
    """First token after 100 ms, then four more in 400 ms."""
    reporter = Reporter(as_client(FakeRouter()))
    attempt = Attempt(reporter, "r0/0", 7)
    clock.now += 0.1
    attempt.tokens(0)  # nothing yet
    attempt.tokens(1)
    clock.now += 0.4
    attempt.tokens(4)
    attempt.end("finished")
    first, last = reporter._waiting
    assert (first.request_id, first.instance_id, first.kind) == ("r0/0", 7, "first_token")
    assert first.ms == pytest.approx(100)
    assert (last.kind, last.output_tokens) == ("finished", 5)
    assert last.ms == pytest.approx(100)


@pytest.mark.parametrize(("tokens", "kinds"), [(0, ["failed"]), (1, ["first_token", "failed"])])
def test_an_attempt_that_fails_early_has_no_time_between_tokens(
    clock: Clock, tokens: int, kinds: list[str]
) -> None:
    reporter = Reporter(as_client(FakeRouter()))
    attempt = Attempt(reporter, "r0/0", 7)
    attempt.tokens(tokens)
    attempt.end("failed")
    assert [report.kind for report in reporter._waiting] == kinds
    assert (reporter._waiting[-1].output_tokens, reporter._waiting[-1].ms) == (tokens, 0.0)
