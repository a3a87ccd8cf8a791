"""Waiting for admission on the event loop: wake-ups, timers, clients that leave, arguments."""

import argparse
import asyncio
from typing import Any, cast

from chapter3.admission import QueueSettings, Ticket
from chapter3.admission_arguments import add_admission_arguments, queue_settings
from chapter3.admission_gate import AdmissionGate, admitting, decision_of
from chapter3.decision import Decision
from chapter3.saturation import Limits
from common.protocol import PipelineError
from tests.chapter3.fleet import FIRST, add_engine, fleet, load, route, source

import msgspec
import pytest
from dynamo.runtime import Context

FULL = load(running=1, waiting=1)


class Client:
    """Stands in for the context of a request."""

    def __init__(self) -> None:
        self.left = asyncio.Event()

    async def async_killed_or_stopped(self) -> bool:
        return await self.left.wait()


async def waited(gate: AdmissionGate, ticket: Ticket, client: Client) -> None:
    async for _ in gate.wait(ticket, cast(Context, client)):
        pass


def now() -> float:
    return asyncio.get_running_loop().time()  # the same clock as `time.monotonic`


async def test_a_request_goes_when_an_engine_says_that_it_has_room() -> None:
    selector = fleet(engines=1, now=now())
    selector.workers[FIRST].hear(FULL, now())
    async with admitting(selector, QueueSettings()) as gate:
        ticket = gate.offer(route([1, 2, 3]))
        waiting = asyncio.create_task(waited(gate, ticket, Client()))
        await asyncio.sleep(0)
        assert gate.watched().waiting == 1
        selector.workers[FIRST].hear(load(), now())
        selector.changed()
        await waiting
        assert isinstance(decision_of(ticket), Decision)
        assert gate.watched().waiting == 0


async def test_an_engine_that_comes_is_noticed() -> None:
    selector = fleet(engines=0)
    async with admitting(selector, QueueSettings()) as gate:
        ticket = gate.offer(route([1, 2, 3]))
        waiting = asyncio.create_task(waited(gate, ticket, Client()))
        await asyncio.sleep(0)
        add_engine(selector, FIRST, source(), now())
        selector.changed()
        await waiting
        assert decision_of(ticket).worker.instance_id == FIRST


@pytest.mark.parametrize(
    ("settings", "deadline_ms"),
    [(QueueSettings(timeout_s=0.05), None), (QueueSettings(), 50.0)],
    ids=["timeout", "deadline"],
)
async def test_with_no_event_at_all_the_time_is_noticed(
    settings: QueueSettings, deadline_ms: float | None
) -> None:
    selector = fleet(engines=1, now=now())
    selector.workers[FIRST].hear(FULL, now())
    async with admitting(selector, settings) as gate:
        ticket = gate.offer(route([1, 2, 3], hints={"deadline_ms": deadline_ms}))
        await waited(gate, ticket, Client())
        with pytest.raises(PipelineError) as caught:
            decision_of(ticket)
        assert caught.value.info.kind == "overloaded"
        assert gate.watched().refused == 1


async def test_a_client_that_leaves_is_noticed_at_once() -> None:
    selector = fleet(engines=1, now=now())
    selector.workers[FIRST].hear(FULL, now())
    async with admitting(selector, QueueSettings()) as gate:
        client = Client()
        ticket = gate.offer(route([1, 2, 3]))
        waiting = asyncio.create_task(waited(gate, ticket, client))
        await asyncio.sleep(0)
        client.left.set()
        await waiting
        assert gate.watched().waiting == 0
        with pytest.raises(PipelineError, match="client has left"):
            decision_of(ticket)
        assert b'refused_total{reason="cancelled"} 1.0' in await metrics_text(gate)


async def test_the_page_is_told_who_waits() -> None:
    selector = fleet(engines=1, now=now())
    selector.workers[FIRST].hear(FULL, now())
    async with admitting(selector, QueueSettings(size=3)) as gate:
        for tenant, priority in (("a", 0), ("b", 0), ("b", 5)):
            gate.offer(route([1], hints={"tenant": tenant, "priority": priority}))
        watched = gate.watched()
        assert (watched.waiting, watched.limit) == (3, 3)
        assert watched.waiting_by_priority == {"5": 1, "0": 2}
        assert watched.waiting_by_tenant == {"b": 2, "a": 1}
        assert msgspec.json.encode(watched)
        text = await metrics_text(gate)
        assert b'router_queue_pending_requests{priority="5"} 1.0' in text


async def metrics_text(gate: AdmissionGate) -> bytes:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": "GET", "path": "/metrics", "headers": []}
    await gate.metrics.app()(scope, receive, send)
    return b"".join(message.get("body", b"") for message in sent)


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_admission_arguments(parser)
    return parser.parse_args(arguments)


def test_the_arguments_have_the_defaults_of_the_settings() -> None:
    assert queue_settings(parsed()) == QueueSettings()
    assert queue_settings(parsed("--no-queue")).limits is None
    everything = parsed(
        *("--max-queue=0", "--queue-timeout=5", "--queue-order=shortest"),
        *("--engine-queue=3", "--max-kv-usage=0.5", "--max-prefill-wait=9"),
    )
    assert queue_settings(everything) == QueueSettings(0, 5, "shortest", Limits(3, 0.5, 9))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--max-queue=-1", "is not an integer of at least 0"),
        ("--queue-timeout=0", "is not a number of seconds above 0"),
        ("--queue-order=random", "is not one of fifo, shortest"),
        ("--max-kv-usage=95", "is not a number above 0 and up to 1"),
    ],
)
def test_wrong_arguments_are_refused(argument: str, message: str) -> None:
    with pytest.raises(argparse.ArgumentError, match=message):
        parsed(argument)


def test_wrong_environment_variables_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUEUE_ORDER", "random")
    with pytest.raises(argparse.ArgumentError, match="is not one of fifo, shortest"):
        parsed()
