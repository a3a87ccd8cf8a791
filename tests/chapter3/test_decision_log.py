"""The record of decisions: bounded, cheap, and what a watcher is shown of it."""

import asyncio
import itertools
from typing import Any

from chapter3.decision import Decision, PolicyInUse
from chapter3.decision_log import KEPT_AT_ONCE, KEPT_PER_S, OPEN_REQUESTS, RECENT, DecisionLog
from chapter3.scoring import Scored
from chapter3.selector import Selector
from chapter3.snapshot import RequestView, Snapshot, WorkerView
from chapter3.watch import FOLLOWED, MAX_WATCHERS, Watched, Watcher
from chapter3.workers import Worker
from common.protocol import EngineInfo, EngineMetrics
from common.protocol_router import KvSource
from common.protocol_routing import ReportKind, RequestReport, RouteRequest

import msgspec

MODEL = "a-model"


def decision(chosen: int = 0, *, shadow: bool = True, now: float = 0.0) -> Decision:
    """Of three engines; the shadow policy prefers the last one."""
    views = tuple(WorkerView(2**60 + id_, id_, 16, 2.5, id_) for id_ in range(3))
    scores = [Scored(-1.0 - (id_ != chosen), {"queue": -1.0, "prefill": 0.0}) for id_ in range(3)]
    theirs = [Scored(float(id_), {"load": float(id_)}) for id_ in range(3)] if shadow else None
    snapshot = Snapshot(RequestView(40), views, now)
    return Decision(snapshot, scores, chosen, "because", theirs)


def report(request_id: str, kind: ReportKind, ms: float, tokens: int = 0) -> RequestReport:
    return RequestReport(request_id, 1, kind, ms, tokens)


def engine(selector: Selector, worker_id: int) -> Worker:
    info = EngineInfo(MODEL, "simulated", 1000, 4, 100, worker_id)
    worker = Worker(2**60 + worker_id, KvSource(info, "topic", "tcp://e", "tcp://m"), synced=True)
    worker.hear(EngineMetrics(1, 2, 30, 100), 0.0)
    selector.workers[worker.instance] = worker
    return worker


def watched(engines: int = 2) -> Watched:
    """A router with some engines; made where an event loop runs."""
    selector = Selector(PolicyInUse.named("earliest_start"), PolicyInUse.named("least_loaded"))
    for worker_id in range(engines):
        engine(selector, worker_id)
    return Watched(selector)


def route(router: Watched, request_id: str, tokens: list[int] | None = None) -> Decision:
    wanted = RouteRequest(tokens or list(range(10)), MODEL, request_id=request_id)
    made = router.selector.select(wanted, 1.0)
    router.add(request_id, made)
    return made


def test_remembers_only_so_much() -> None:
    log = DecisionLog()
    count = OPEN_REQUESTS + RECENT
    for number in range(count):
        log.add(f"r{number}", decision(now=float(number)))
    assert log.decided == log.chosen.total() == count
    assert [logged.number for logged in log.recent] == list(range(count - RECENT + 1, count + 1))
    assert len(log._open) == OPEN_REQUESTS
    assert [logged.number for logged in log.since(count - 2)] == [count - 1, count]
    assert log.since(count) == []


def test_of_many_decisions_a_sample_is_kept_evenly_spread() -> None:
    log = DecisionLog()
    for number in range(2000):
        log.add("", decision(now=number / 1000))
    numbers = [logged.number for logged in log.recent][int(KEPT_AT_ONCE) + 1 :]
    steps = [after - before for before, after in itertools.pairwise(numbers)]
    assert {round(1000 / KEPT_PER_S)} <= set(steps) <= {41, 42}
    assert log.decided == 2000


def test_what_became_of_a_request() -> None:
    log = DecisionLog()
    log.add("a/0", decision())
    log.report(report("a/0", "first_token", 12.5))
    outcome = log.recent[0].outcome
    assert (outcome.state, outcome.first_token_ms, outcome.ended) == ("answering", 12.5, False)
    log.report(report("a/0", "finished", 7.0, 9))
    assert (outcome.state, outcome.output_tokens, outcome.ms_per_token) == ("finished", 9, 7.0)
    assert outcome.first_token_ms == 12.5
    log.report(report("a/0", "failed", 0.0))  # nothing comes after the end
    assert outcome.state == "finished"
    log.report(report("unknown/0", "finished", 0.0))


def test_a_request_that_fails_before_its_first_token() -> None:
    log = DecisionLog()
    log.add("a/0", decision())
    log.report(report("a/0", "failed", 0.0))
    assert log.recent[0].outcome.state == "failed"
    assert log.recent[0].outcome.first_token_ms is None


async def test_an_update_shows_the_decision_with_all_its_terms() -> None:
    router = watched()
    watcher = Watcher(router)
    assert watcher.update(1.0).decisions == []
    made = route(router, "a/0")
    update = watcher.update(2.0)
    (shown,) = update.decisions
    assert (shown.request_id, shown.policy, shown.shadow_policy) == (
        "a/0",
        "earliest_start",
        "least_loaded",
    )
    assert shown.chosen == made.chosen
    names = set(made.scores[0].terms)
    assert names >= {"queue", "prefill"}
    assert [set(candidate.terms) for candidate in shown.candidates] == [names] * 2
    assert [candidate.score for candidate in shown.candidates] == [
        score.total for score in made.scores
    ]
    assert set(shown.candidates[0].shadow_terms) == {"running", "waiting"}
    assert update.decided == update.new == 1
    assert watcher.update(3.0).decisions == []


async def test_margin_and_the_shadow_policys_choice() -> None:
    router = watched()
    router.add("a/0", decision(chosen=0))
    router.add("b/0", decision(chosen=2, shadow=False))
    first, second = Watcher(router).update(1.0).decisions
    assert (first.margin, first.shadow_chosen, first.shadow_regret) == (1.0, 2, 2.0)
    assert (second.shadow_chosen, second.shadow_regret) == (None, 0.0)


async def test_one_engine_has_no_margin() -> None:
    router = watched(engines=1)
    route(router, "a/0")
    assert Watcher(router).update(1.0).decisions[0].margin is None


async def test_at_many_decisions_a_sample_is_shown() -> None:
    router = watched()
    route(router, "first/0")
    watcher = Watcher(router)
    watcher.update(0.0)
    for number in range(1000):
        router.add(f"r{number}/0", decision(now=5 + number / 4000))
    update = watcher.update(1.0)
    assert update.new == 1000
    assert KEPT_AT_ONCE <= len(update.decisions) <= KEPT_AT_ONCE + KEPT_PER_S / 4
    assert len(Watcher(router).update(1.0).decisions) == len(update.decisions) + 1


async def test_outcomes_of_what_was_shown_are_told_once() -> None:
    router = watched()
    watcher = Watcher(router)
    watcher.update(0.0)
    route(router, "a/0")
    assert watcher.update(1.0).outcomes == []
    router.log.report(report("a/0", "first_token", 5.0))
    (answering,) = watcher.update(2.0).outcomes
    assert (answering.number, answering.state, answering.first_token_ms) == (1, "answering", 5.0)
    assert watcher.update(3.0).outcomes == []
    router.log.report(report("a/0", "finished", 2.0, 3))
    assert watcher.update(4.0).outcomes[0].state == "finished"
    assert watcher._followed == {}


async def test_reports_that_went_to_another_router_are_heard() -> None:
    """It passes them on to the selector."""
    router = watched()
    route(router, "a/0")
    router.selector.report(report("a/0", "finished", 2.0, 3), 2.0)
    assert router.log.recent[0].outcome.state == "finished"


async def test_a_watcher_follows_only_so_many_requests() -> None:
    router = watched()
    watcher = Watcher(router)
    for number in range(2 * FOLLOWED):
        router.add(f"{number}/0", decision(now=float(number)))
        watcher.update(float(number))
    assert len(watcher._followed) == FOLLOWED


async def test_workers_in_an_update() -> None:
    router = watched()
    made = route(router, "a/0", list(range(90)))
    update = Watcher(router).update(1.0)
    assert [worker.worker_id for worker in update.workers] == [0, 1]
    chosen = update.workers[made.worker.worker_id]
    assert chosen.instance == f"{made.worker.instance_id:x}"
    assert (chosen.state, chosen.chosen, chosen.prefill_tokens) == ("ready", 1, 90)
    router.selector.remove(made.worker.instance_id)
    assert len(Watcher(router).update(1.0).workers) == 1
    assert made.worker.instance_id not in router.log.chosen


async def test_an_update_has_no_number_that_a_browser_would_round() -> None:
    router = watched()
    route(router, "a/0", list(range(90)))

    def numbers(value: Any) -> list[float]:
        if isinstance(value, dict):
            return [number for item in value.values() for number in numbers(item)]
        if isinstance(value, list):
            return [number for item in value for number in numbers(item)]
        return [value] if isinstance(value, int | float) else []

    found = numbers(msgspec.to_builtins(Watcher(router).update(1.0)))
    assert found
    assert max(map(abs, found)) < 2**53


class FakeContext:
    """The watcher's side of a stream."""

    def __init__(self) -> None:
        self.left = asyncio.Event()

    async def async_killed_or_stopped(self) -> None:
        await self.left.wait()


async def test_the_stream_ends_when_the_watcher_leaves_or_the_router_closes() -> None:
    router = watched()
    for end in ("left", "closed"):
        context = FakeContext()
        stream = router.watch({}, context)  # type: ignore[arg-type]
        assert (await anext(stream))["workers"]
        if end == "left":
            context.left.set()
        else:
            await router.aclose()
        assert [item async for item in stream] == []
    assert router._watchers == 0


async def test_there_are_only_so_many_watchers() -> None:
    router = watched()
    streams = [router.watch({}, FakeContext()) for _ in range(MAX_WATCHERS)]  # type: ignore[arg-type]
    for stream in streams:
        await anext(stream)
    (refusal,) = [item async for item in router.watch({}, FakeContext())]  # type: ignore[arg-type]
    assert refusal["error"]["kind"] == "overloaded"
    for stream in streams:
        await stream.aclose()
    assert router._watchers == 0
