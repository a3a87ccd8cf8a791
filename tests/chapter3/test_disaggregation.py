"""When another engine computes a prompt, which one, and what the router counts meanwhile."""

import asyncio
import pickle
from collections.abc import AsyncIterator
from typing import Any, cast

from chapter3.canary import figures
from chapter3.decision import Decision, output
from chapter3.disaggregation import PrefillRule, prefill_id
from chapter3.remote_prefill import RemotePrefill
from chapter3.routed_stream import routed_stream
from chapter3.selector import Selector
from chapter3.silence import Silence
from common.dispatch import NOT_LISTED
from common.protocol import (
    EngineOutput,
    EngineTimings,
    ErrorInfo,
    GenerateRequest,
    PipelineError,
    to_wire,
)
from common.protocol_routing import (
    PrefillChoice,
    ReportKind,
    RequestReport,
    RouteOutput,
    RouteRequest,
)
from common.protocol_transfer import KvDescriptor, Role
from tests.chapter3.fleet import FIRST, add_engine, fleet, load, route, source, stored, view
from tests.chapter3.test_routed_stream import DIED, ENOUGH, GONE, FakeContext, FakeEngine, Run

import pytest
from dynamo.runtime import Client, Context

PROMPT = list(range(1, 202))
P0, P1, D2, D3 = FIRST, FIRST + 1, FIRST + 2, FIRST + 3
TWO_AND_TWO: tuple[Role, ...] = ("prefill", "prefill", "decode", "decode")


def of_roles(*roles: Role, policy: str = "kv", min_tokens: int = 64) -> Selector:
    """Idle engines of blocks of 4 tokens, instances 101, 102, ... of these roles."""
    selector = fleet(policy, engines=0)
    selector.prefill_rule = PrefillRule(min_tokens)
    for worker_id, role in enumerate(roles):
        known = source(worker_id)
        known.role = role
        add_engine(selector, FIRST + worker_id, known).hear(load(), 0.0)
    selector.health.check(figures(selector.workers, 0.0), 0.0)
    return selector


def choice(
    selector: Selector, request_id: str = "r/0", now: float = 0.0, **fields: Any
) -> Decision:
    tokens = fields.pop("tokens", PROMPT)
    return selector.select(route(tokens, request_id), now, **fields)


def instances(decision: Decision) -> tuple[int, int | None]:
    """The engine that generates, and the one that computes the prompt for it."""
    prefill = decision.prefill
    return decision.worker.instance_id, None if prefill is None else prefill.worker.instance_id


def tell(
    selector: Selector, name: str, instance: int, kind: ReportKind, now: float, tokens: int = 0
) -> None:
    selector.report(RequestReport(name, instance, kind, 1.0, tokens), now)


@pytest.mark.parametrize(
    ("rule", "prompt_blocks", "overlap", "wait_s", "pays"),
    [
        (PrefillRule(), 10.0, 0, 0.0, True),
        (PrefillRule(160), 10.0, 0, 0.0, True),
        (PrefillRule(161), 10.0, 0, 0.0, False),
        (PrefillRule(64), 10.0, 6, 0.0, True),
        (PrefillRule(64), 10.0, 7, 0.0, False),
        (PrefillRule(0), 10.0, 9, 0.0, True),
        (PrefillRule(0), 10.0, 10, 0.0, False),
        (PrefillRule(max_wait_s=2.0), 10.0, 0, 2.0, True),
        (PrefillRule(max_wait_s=2.0), 10.0, 0, 2.1, False),
    ],
)
def test_the_rule(
    rule: PrefillRule, prompt_blocks: float, overlap: int, wait_s: float, pays: bool
) -> None:
    decode = view(0, prompt_blocks=prompt_blocks, overlap_blocks=overlap)
    assert rule.pays(decode, view(1, prefill_s=wait_s)) is pays


def test_each_role_has_the_engine_that_the_policy_prefers() -> None:
    """Of the decode engines the less loaded one, of the prefill engines the one with the prefix."""
    selector = of_roles(*TWO_AND_TWO)
    selector.workers[D2].hear(load(running=5, used_blocks=80), 0.0)
    selector.index.apply(P1, [stored(PROMPT[:40])])
    decision = choice(selector)
    assert instances(decision) == (D3, P1)
    found = output(decision)
    assert found.prefill is not None
    assert (found.prefill.request_id, found.prefill.overlap_blocks) == ("r/0/prefill", 10)
    assert "the prompt is computed by worker 1" in found.reason
    assert {candidate.instance_id for candidate in found.candidates} == {D2, D3}


def test_a_prompt_that_is_short_or_mostly_cached_stays_where_it_is_decoded() -> None:
    selector = of_roles("prefill", "decode")
    assert instances(choice(selector, tokens=PROMPT[:60])) == (P1, None)
    selector.index.apply(P1, [stored(PROMPT[:140])])
    assert instances(choice(selector)) == (P1, None)


def test_prefill_engines_that_are_too_busy_are_passed_over() -> None:
    selector = of_roles("prefill", "decode")
    selector.prefill_rule = PrefillRule(64, max_wait_s=1.0)
    long = list(range(16_000))  # 2 s at the assumed speed
    assert instances(choice(selector, "a", tokens=long)) == (P1, P0)
    assert instances(choice(selector, "b", tokens=long[1:])) == (P1, None)


@pytest.mark.parametrize(
    "trouble", ["failed", "silent", "quarantined", "excluded", "model", "gone"]
)
def test_a_prefill_engine_in_trouble_is_not_asked(trouble: str) -> None:
    selector = of_roles("prefill", "decode", "decode", "decode")
    now, excluded = 0.0, []
    match trouble:
        case "failed":
            selector.fail(P0)
        case "silent":
            now = 100.0
            for instance in (P1, D2, D3):
                selector.workers[instance].hear(load(), now)
        case "quarantined":
            selector.health.engines[P0].strike("slow", 1.0, 0.0)
        case "excluded":
            excluded = [P0]
        case "model":
            selector.workers[P0].source.info.model = "another"
        case "gone":
            selector.remove(P0)
    chosen, prefill = instances(choice(selector, now=now, excluded=excluded))
    assert (chosen in (P1, D2, D3), prefill) == (True, None)


def test_engines_that_do_it_all_compute_their_own_prompts() -> None:
    selector = of_roles("prefill", "aggregated")
    assert instances(choice(selector)) == (P1, None)
    selector = of_roles("prefill", "aggregated", "decode")
    found = {instances(choice(selector, f"r{n}/0", tokens=PROMPT[n:])) for n in range(6)}
    assert found == {(P1, None), (D2, P0)}


def test_prefill_engines_alone_serve() -> None:
    selector = of_roles("prefill", "prefill", "decode")
    assert instances(choice(selector, excluded=[D2]))[1] is None
    selector.remove(D2)
    decision = choice(selector)
    assert decision.worker.instance_id in (P0, P1)
    assert decision.prefill is None
    with pytest.raises(PipelineError, match="No engine"):
        choice(selector, excluded=[P0, P1])


def test_both_engines_have_the_load_until_each_is_done() -> None:
    selector = of_roles("prefill", "decode")
    choice(selector)
    prefill, decode = selector.active.load(P0), selector.active.load(P1)
    assert (prefill.prefill_tokens, prefill.prefill_requests) == (201, 1)
    assert (decode.prefill_tokens, decode.prefill_requests, decode.requests_elsewhere) == (0, 1, 1)
    assert decode.active_blocks > 50
    tell(selector, "r/0/prefill", P0, "first_token", 1.0, 1)
    tell(selector, "r/0/prefill", P0, "finished", 1.0, 1)
    assert (prefill.prefill_requests, prefill.decode_requests, prefill.active_blocks) == (0, 0, 0)
    assert (decode.prefill_tokens, decode.requests_elsewhere) == (0, 0)
    tell(selector, "r/0", P1, "first_token", 1.1, 1)
    assert (decode.prefill_requests, decode.decode_requests) == (0, 1)
    tell(selector, "r/0", P1, "finished", 2.0, 30)
    assert (decode.decode_requests, decode.active_blocks) == (0, 0)
    assert not selector.active.requests


@pytest.mark.parametrize("kind", ["failed", "finished"])
def test_a_prompt_that_was_not_computed_is_work_for_the_other_engine(kind: ReportKind) -> None:
    """It failed, or was refused."""
    selector = of_roles("prefill", "decode")
    choice(selector)
    tell(selector, "r/0/prefill", P0, kind, 1.0)
    assert selector.active.load(P1).prefill_tokens == 201
    sent = selector.health.engines[P1].sent["r/0"]
    assert (sent.time, sent.own_tokens) == (1.0, 201)


def test_the_answers_mean_length_is_that_of_whole_answers() -> None:
    selector = of_roles("prefill", "decode")
    choice(selector)
    mean = selector.mean_output_tokens
    tell(selector, "r/0/prefill", P0, "finished", 1.0, 1)
    assert selector.mean_output_tokens == mean
    tell(selector, "r/0", P1, "finished", 2.0, 1000)
    assert selector.mean_output_tokens > mean


def test_an_engine_is_not_overdue_with_what_it_does_not_have_yet() -> None:
    """Its first token is late by as much as the prefill engine takes."""
    selector = of_roles("prefill", "decode")
    choice(selector)
    for now in range(1, 30):
        for worker in selector.workers.values():
            worker.hear(load(running=1), float(now))  # the decode engine has another request
        selector.workers[P0].metrics.prompt_tokens = now  # type: ignore[union-attr]
        selector.health.check(figures(selector.workers, now), float(now))
    assert selector.health.state(P1) == "healthy"
    tell(selector, "r/0/prefill", P0, "finished", 30.0, 1)
    for now in range(30, 60):
        selector.health.check(figures(selector.workers, 30.0), float(now))
    assert "no first token for" in selector.health.why(P1)


def test_a_request_that_the_engine_does_not_have_yet_is_not_lost() -> None:
    selector = of_roles("prefill", "decode")
    choice(selector)
    active = selector.active
    for now in range(1, 20):
        assert active.reconcile(P1, 0, float(now)) == []
    assert "r/0" in active.requests
    tell(selector, "r/0/prefill", P0, "finished", 20.0, 1)
    assert active.reconcile(P1, 0, 20.5) == []
    assert active.reconcile(P1, 0, 26.0) == ["r/0"]
    assert active.load(P1).active_blocks == 0


@pytest.mark.parametrize("lost", ["reconciled", "removed"])
def test_a_request_whose_prefill_nobody_reports_is_lost_with_it(lost: str) -> None:
    """The processor was killed."""
    selector = of_roles("prefill", "decode")
    choice(selector)
    if lost == "removed":
        selector.remove(P0)
    else:
        assert selector.active.reconcile(P0, 0, 1.0) == []
        assert selector.active.reconcile(P0, 0, 7.0) == ["r/0/prefill"]
    assert selector.active.load(P1).requests_elsewhere == 0
    assert selector.active.reconcile(P1, 0, 10.0) == []
    assert selector.active.reconcile(P1, 0, 16.0) == ["r/0"]


def test_a_router_that_hears_of_it_counts_the_same() -> None:
    selector, other = of_roles("prefill", "decode"), of_roles("prefill", "decode")
    selector.tell = lambda routed: other.count(pickle.loads(pickle.dumps(routed)), 0.0)  # noqa: S301
    choice(selector)
    for one in (selector, other):
        assert one.active.load(P1).requests_elsewhere == 1
        tell(one, "r/0/prefill", P0, "finished", 1.0, 1)
        assert one.active.load(P1).requests_elsewhere == 0
        assert "r/0" in one.health.engines[P1].sent


class OneOfEach:
    """A prefill engine, 100, and a decode engine, 101; the router's choice is always theirs."""

    def __init__(self, prefill: FakeEngine) -> None:
        self.run = Run(prefill, FakeEngine())
        self.run.router._answer = self._answer  # type: ignore[method-assign]

    async def _answer(self, wanted: RouteRequest, context: Any) -> AsyncIterator[Any]:
        prefill = PrefillChoice(prefill_id(wanted.request_id), 100, 0)
        yield to_wire(RouteOutput(101, 1, reason="decode", prefill=prefill))

    @property
    def kinds(self) -> list[tuple[str, int, str]]:
        return [(name.removeprefix("request/0"), at, kind) for name, at, kind in self.run.kinds]


PREFILL_ENDS = [("/prefill", 100, "first_token"), ("/prefill", 100, "finished")]
DECODE_ENDS = [("", 101, "first_token"), ("", 101, "finished")]
NOT_LISTED_HERE = f"Unavailable: instance 100 {NOT_LISTED} engine.generate"


async def test_an_answer_by_way_of_a_prefill_engine() -> None:
    kv = EngineOutput([ENOUGH[0]], kv=KvDescriptor("zmq", 3), timings=EngineTimings(1.0, 2.0, 3.0))
    both = OneOfEach(FakeEngine(0, kv))
    assert await both.run() == ENOUGH
    first, second = (engine.requests[0] for engine in both.run.engines)
    assert (first.prefill_only, first.generated, first.kv) == (True, 0, None)
    assert (second.prefill_only, second.generated, second.kv) == (False, 1, kv.kv)
    assert both.kinds == [*PREFILL_ENDS, *DECODE_ENDS]
    assert both.run.progress.migrations == 0
    timings = both.run.items[-1].timings
    assert timings == EngineTimings(1.0, 3.0, 1.0)


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (DIED, "failed"),
        (GONE, "failed"),
        (NOT_LISTED_HERE, "finished"),
        (EngineOutput(error=ErrorInfo("internal", "a bug")), "failed"),
        (EngineOutput(error=ErrorInfo("overloaded", "full")), "finished"),
        (EngineOutput(error=ErrorInfo("invalid_request", "no --role prefill")), "finished"),
    ],
    ids=str,
)
async def test_a_prefill_engine_that_fails_changes_nothing(
    failure: str | EngineOutput, kind: str
) -> None:
    both = OneOfEach(FakeEngine(0, failure))
    assert await both.run() == ENOUGH
    assert both.run.engines[1].requests[0].kv is None
    assert both.kinds == [("/prefill", 100, kind), *DECODE_ENDS]


async def test_every_attempt_is_reported_when_the_reader_leaves_at_the_first_token() -> None:
    """Else the processor would wait for it when it is to stop."""
    kv = EngineOutput([ENOUGH[0]], kv=KvDescriptor("zmq", 3))
    both = OneOfEach(FakeEngine(0, kv))
    run = both.run
    stream = routed_stream(run.hops, run.request, run.progress, 0.0, cast(Context, run.context))
    assert (await anext(stream)).token_ids == ENOUGH[:1]
    await stream.aclose()
    assert both.kinds == [*PREFILL_ENDS, ("", 101, "failed")]
    await asyncio.wait_for(run.reports._idle.wait(), 5)


async def test_a_prefill_engine_that_waits_for_the_other_one_learns_that_the_client_left() -> None:
    """SGLang keeps the prompt's KV until it is fetched."""
    stopped = [asyncio.Event(), asyncio.Event()]  # the client's context, the prefill engine's

    class Linked(FakeContext):
        def __init__(self, which: int) -> None:
            super().__init__()
            self.which = which

        def detached(self, request_id: str) -> "Linked":
            return Linked(1)

        def stop_generating(self) -> None:
            stopped[self.which].set()

        async def async_killed_or_stopped(self) -> bool:
            return await stopped[self.which].wait()

    class Engine:
        async def direct(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            return self._stream()

        async def _stream(self) -> AsyncIterator[Any]:
            yield to_wire(EngineOutput(kv=KvDescriptor("sglang", 3)))
            await stopped[1].wait()

    async def hangs(instance: int) -> bool:
        return False

    remote = RemotePrefill(cast(Client, Engine()), 60.0)
    context = cast(Context, Linked(0))
    silence = Silence(lambda: [100], hangs)
    answer = await remote.compute(GenerateRequest([1, 2, 3]), 100, silence, context)
    assert answer.kv == KvDescriptor("sglang", 3)
    assert not stopped[1].is_set()
    stopped[0].set()
    await asyncio.wait_for(stopped[1].wait(), 30)
    await remote.close()
