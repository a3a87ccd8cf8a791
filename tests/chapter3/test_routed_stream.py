"""The way to an engine when engines and routers fail; the runtime's clients are stand-ins."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from chapter3 import silence
from chapter3.hops import Hops
from chapter3.migration import Progress
from chapter3.remote_prefill import RemotePrefill
from chapter3.reports import Reporter
from chapter3.routed_stream import routed_stream
from common.protocol import (
    EngineOutput,
    EngineTimings,
    ErrorInfo,
    GenerateRequest,
    PipelineError,
    SamplingParams,
    from_wire,
    to_wire,
)
from common.protocol_router import State
from common.protocol_routing import (
    RequestReport,
    RoutedProcessRequest,
    RoutedWorkerState,
    RouteOutput,
    RouteRequest,
    RoutingHints,
)

import pytest
from dynamo.runtime import Client, Context

PROMPT = [1, 2, 3]
DIED = "Unavailable: Stream ended before generation completed"
GONE = "Unavailable: NATS request to somewhere failed"
HANDLER = "Internal: RuntimeError: a bug"


class FakeContext:
    def __init__(self) -> None:
        self.stopped = False

    def id(self) -> str:
        return "request"

    def is_stopped(self) -> bool:
        return self.stopped

    def detached(self, request_id: str) -> "FakeContext":
        return FakeContext()

    def stop_generating(self) -> None:
        self.stopped = True

    async def async_killed_or_stopped(self) -> bool:
        return await asyncio.Event().wait()


def output_of(prompt: list[int], length: int) -> list[int]:
    """What every engine makes of a prompt: each token follows from all before it."""
    tokens = list(prompt)
    for _ in range(length):
        tokens.append(sum(tokens) % 997)
    return tokens[len(prompt) :]


@dataclass
class FakeEngine:
    """It fails when it has sent `lives` tokens of a stream: raises a text or sends an item."""

    lives: int | None = None
    failure: str | EngineOutput = DIED
    requests: list[GenerateRequest] = field(default_factory=list)

    async def stream(self, worker: int, wire: Any, context: FakeContext) -> AsyncIterator[Any]:
        request = from_wire(wire, GenerateRequest)
        self.requests.append(request)
        limit = request.sampling.max_tokens or 20
        prompt = request.token_ids[: len(request.token_ids) - request.generated]
        tokens = output_of(prompt, limit)[request.generated :]
        for sent, token in enumerate(tokens):
            if self.lives == sent:
                if isinstance(self.failure, str):
                    raise ValueError(self.failure)
                yield to_wire(self.failure)
                return
            if context.stopped:
                return
            output = EngineOutput([token])
            if sent == 0:
                output.worker_id, output.cached_tokens = worker, request.generated + 1
            if sent == len(tokens) - 1:
                output.finish_reason, output.timings = "length", EngineTimings(0.0, 1.0, 1.0)
            yield to_wire(output)


class FakeEngines:
    """The client of the engines, by instance id."""

    def __init__(self, engines: Sequence[FakeEngine]) -> None:
        self.engines = dict(enumerate(engines, 100))
        self._turn = 0

    def instance_ids(self) -> list[int]:
        return list(self.engines)

    async def direct(
        self, request: Any, instance: int, *, annotated: bool, context: FakeContext
    ) -> AsyncIterator[Any]:
        return self.engines[instance].stream(instance - 100, request, context)

    async def round_robin(
        self, request: Any, *, annotated: bool, context: FakeContext
    ) -> AsyncIterator[Any]:
        self._turn += 1
        return await self.direct(request, 99 + self._turn, annotated=annotated, context=context)


class FakeRouter:
    """The client of a router that names the first engine that is not excluded."""

    def __init__(self, engines: FakeEngines) -> None:
        self.engines = engines
        self.up = True
        self.asked: list[RouteRequest] = []
        self.on_ask: Callable[[], None] = lambda: None

    def instance_ids(self) -> list[int]:
        return [1] if self.up else []

    async def round_robin(
        self, request: Any, *, annotated: bool, context: FakeContext
    ) -> AsyncIterator[Any]:
        wanted = from_wire(request, RouteRequest)
        wanted.excluded = list(wanted.excluded)
        self.asked.append(wanted)
        self.on_ask()
        return self._answer(wanted, context)

    async def _answer(self, wanted: RouteRequest, context: FakeContext) -> AsyncIterator[Any]:
        if context.stopped:
            return
        free = [key for key in self.engines.engines if key not in wanted.excluded]
        if free:
            yield to_wire(RouteOutput(free[0], free[0] - 100, reason="the first"))
        else:
            error = ErrorInfo("unavailable", "No engine with the model is ready")
            yield to_wire(RouteOutput(error=error))


class FakeStates:
    """The client of a router's state: all engines, those in `silent` as silent."""

    def __init__(self, engines: FakeEngines) -> None:
        self.engines = engines
        self.silent: set[int] = set()

    def instance_ids(self) -> list[int]:
        return [1]

    async def round_robin(self, *args: Any, **options: Any) -> AsyncIterator[Any]:
        return self._answer()

    async def _answer(self) -> AsyncIterator[Any]:
        for key in self.engines.engines:
            state: State = "silent" if key in self.silent else "ready"
            yield to_wire(RoutedWorkerState(key, key - 100, "model", state, 0))


class Reports(Reporter):
    def __init__(self, router: Client) -> None:
        super().__init__(router)
        self.all: list[RequestReport] = []

    def add(self, report: RequestReport) -> None:
        self.all.append(report)


class Run:
    """One request to some engines."""

    def __init__(
        self,
        *engines: FakeEngine,
        limit: int = 3,
        fallback: bool = False,
        context_length: int = 100,
        hints: RoutingHints | None = None,
        **sampling: Any,
    ) -> None:
        self.engines = engines
        self.client = FakeEngines(engines)
        self.router = FakeRouter(self.client)
        self.states = FakeStates(self.client)
        self.reports = Reports(cast(Client, self.router))
        self.context = FakeContext()
        params = SamplingParams(**{"max_tokens": 10, **sampling})
        self.request = RoutedProcessRequest(
            "model", prompt=PROMPT, sampling=params, hints=hints or RoutingHints()
        )
        self.progress = Progress(PROMPT, params, context_length, limit)
        self.hops = Hops(
            "model",
            cast(Client, self.client),
            cast(Client, self.router),
            cast(Client, self.states),
            self.reports,
            RemotePrefill(cast(Client, self.client), 5.0),
            fallback,
        )
        self.items: list[EngineOutput] = []

    async def __call__(self, *, cancel_after: int | None = None) -> list[int]:
        context = cast(Context, self.context)
        async for item in routed_stream(self.hops, self.request, self.progress, 0.0, context):
            self.items.append(item)
            self.context.stopped |= len(self.items) == cancel_after
        return self.tokens

    async def fails(self) -> Exception:
        with pytest.raises((PipelineError, ValueError)) as caught:
            await self()
        assert self.tokens == output_of(PROMPT, 10)[: len(self.tokens)]
        return caught.value

    @property
    def tokens(self) -> list[int]:
        return [token for item in self.items for token in item.token_ids]

    @property
    def used(self) -> list[int]:
        """How many requests each engine got."""
        return [len(engine.requests) for engine in self.engines]

    @property
    def kinds(self) -> list[tuple[str, int, str]]:
        return [(report.request_id, report.instance_id, report.kind) for report in self.reports.all]


ENOUGH = output_of(PROMPT, 10)


@pytest.mark.parametrize(
    "failure",
    [
        DIED,
        HANDLER,
        EngineOutput(error=ErrorInfo("internal", "the engine failed")),
        EngineOutput(error=ErrorInfo("unavailable", "the engine is closed")),
        EngineOutput(finish_reason="cancelled", timings=EngineTimings(0.0, 0.0, 0.0)),
    ],
    ids=str,
)
async def test_another_engine_goes_on(failure: str | EngineOutput) -> None:
    run = Run(FakeEngine(4, failure), FakeEngine())
    assert await run() == ENOUGH
    second = run.engines[1].requests[0]
    assert (second.token_ids, second.generated) == ([*PROMPT, *ENOUGH[:4]], 4)
    assert second.sampling == run.request.sampling
    assert [item.finish_reason for item in run.items] == [None] * 9 + ["length"]
    assert [item.cached_tokens for item in run.items] == [1] + [None] * 9
    assert [item.worker_id for item in run.items] == [0, *[None] * 3, 1, *[None] * 5]
    assert run.progress.migrations == 1


async def test_a_cancelled_item_has_tokens_that_count() -> None:
    last = EngineOutput([ENOUGH[3]], finish_reason="cancelled")
    assert await Run(FakeEngine(3, last), FakeEngine())() == ENOUGH


async def test_the_router_learns_who_failed_and_each_attempt_has_a_name() -> None:
    run = Run(FakeEngine(4), FakeEngine(3), FakeEngine())
    assert await run() == ENOUGH
    assert [wanted.failed for wanted in run.router.asked] == [[], [100], [101]]
    assert [wanted.excluded for wanted in run.router.asked] == [[], [100], [100, 101]]
    assert [wanted.max_tokens for wanted in run.router.asked] == [10, 6, 3]
    assert run.router.asked[2].token_ids == [*PROMPT, *ENOUGH[:7]]
    assert run.kinds == [
        ("request/0", 100, "first_token"),
        ("request/0", 100, "failed"),
        ("request/1", 101, "first_token"),
        ("request/1", 101, "failed"),
        ("request/2", 102, "first_token"),
        ("request/2", 102, "finished"),
    ]


async def test_an_answer_in_the_midst_waits_no_more_and_has_less_to_come() -> None:
    hints = RoutingHints(priority=2, tenant="a", deadline_ms=50.0, output_tokens=12)
    run = Run(FakeEngine(4), FakeEngine(), hints=hints)
    assert await run() == ENOUGH
    first, second = (wanted.hints for wanted in run.router.asked)
    assert first == hints
    assert second == RoutingHints(priority=2, tenant="a", deadline_ms=50.0, output_tokens=8)
    assert [wanted.admitted for wanted in run.router.asked] == [False, True]


@pytest.mark.parametrize(("lives", "used"), [(0, 2), (1, 3), (5, 3)])
async def test_a_request_that_kills_does_not_take_all_engines(lives: int, used: int) -> None:
    """Each dies over the same token of the answer, however far the first one came."""
    run = Run(FakeEngine(lives), *(FakeEngine(0) for _ in range(5)), limit=9)
    assert DIED in str(await run.fails())
    assert run.used == [1] * used + [0] * (6 - used)
    assert [kind for _, _, kind in run.kinds].count("failed") == used


async def test_engines_that_die_before_they_send_anything_count_for_the_limit() -> None:
    run = Run(FakeEngine(4), FakeEngine(0), FakeEngine(), limit=1)
    assert DIED in str(await run.fails())
    run = Run(FakeEngine(4), FakeEngine(0), FakeEngine(), limit=2)
    assert await run() == ENOUGH
    assert run.progress.migrations == 1


async def test_also_one_whose_engines_say_that_they_failed() -> None:
    broken = EngineOutput(error=ErrorInfo("internal", "out of memory"))
    run = Run(*(FakeEngine(0, broken) for _ in range(5)))
    assert str(await run.fails()) == "out of memory"
    assert run.used == [1, 1, 0, 0, 0]


@pytest.mark.parametrize("limit", [0, 1, 2])
async def test_the_limit(limit: int) -> None:
    run = Run(*(FakeEngine(2) for _ in range(5)), limit=limit)
    assert DIED in str(await run.fails())
    assert run.used == [1] * (limit + 1) + [0] * (4 - limit)
    assert len(run.tokens) == 2 * (limit + 1)


async def test_engines_that_refuse_at_once_cost_no_try() -> None:
    """They are gone, and nobody has told the router yet."""
    dead = [FakeEngine(0, GONE) for _ in range(6)]
    run = Run(FakeEngine(4), *dead, FakeEngine(), limit=1)
    assert await run() == ENOUGH
    assert run.router.asked[-1].failed == [106]


async def test_full_engines_are_passed_over_in_the_midst_of_an_answer() -> None:
    full = EngineOutput(error=ErrorInfo("overloaded", "the engine is full"))
    run = Run(FakeEngine(4), FakeEngine(0, full), FakeEngine())
    assert await run() == ENOUGH
    assert [wanted.failed for wanted in run.router.asked] == [[], [100], []]
    assert [kind for _, instance, kind in run.kinds if instance == 101] == ["finished"]
    assert run.progress.migrations == 1


@pytest.mark.parametrize(
    ("kind", "lives"), [("overloaded", 0), ("invalid_request", 0), ("invalid_request", 3)]
)
async def test_a_refusal_that_concerns_the_request_is_its_end(kind: Any, lives: int) -> None:
    run = Run(FakeEngine(lives, EngineOutput(error=ErrorInfo(kind, "no", "seed"))), FakeEngine())
    error = await run.fails()
    assert isinstance(error, PipelineError)
    assert (error.info.kind, error.info.param) == (kind, "seed")
    assert run.used == [1, 0]
    assert run.kinds[-1][2] == "finished", "the engine is not to blame"


async def test_no_engine_is_left() -> None:
    run = Run(FakeEngine(4))
    error = await run.fails()
    assert isinstance(error, PipelineError)
    assert error.info.kind == "unavailable"
    assert str(error) == (
        "The engine was lost after 4 tokens, and no other can go on: "
        "No engine with the model is ready"
    )


@pytest.mark.parametrize("fallback", [False, True])
async def test_the_router_is_gone_at_that_moment(fallback: bool) -> None:
    run = Run(FakeEngine(4), FakeEngine(), fallback=fallback)
    run.router.on_ask = lambda: setattr(run.router, "up", False)
    if fallback:
        run.client._turn = 1  # the dead engine has had its turn
        assert await run() == ENOUGH
    else:
        assert "and no other can go on: No router is up" in str(await run.fails())


@pytest.mark.parametrize(
    ("sampling", "context_length", "reason"),
    [
        ({"max_tokens": 4}, 100, "length"),
        ({"max_tokens": None}, 7, "length"),
        ({"stop_token_ids": [ENOUGH[3]]}, 100, "stop"),
    ],
)
async def test_only_the_finish_reason_was_missing(
    sampling: dict[str, Any], context_length: int, reason: str
) -> None:
    full = FakeEngine(lives=3, failure=EngineOutput([ENOUGH[3]], error=ErrorInfo("internal", "")))
    run = Run(full, FakeEngine(), limit=0, context_length=context_length, **sampling)
    assert await run() == ENOUGH[:4]
    assert run.items[-1].finish_reason == reason
    assert run.items[-1].timings is not None
    assert run.used == [1, 0]


async def test_a_failure_after_the_finish_reason_is_no_reason_to_go_on() -> None:
    class Late(FakeEngine):
        async def stream(self, worker: int, wire: Any, context: FakeContext) -> AsyncIterator[Any]:
            async for item in super().stream(worker, wire, context):
                yield item
            raise ValueError(DIED)

    run = Run(Late(), FakeEngine())
    assert DIED in str(await run.fails())
    assert run.tokens == ENOUGH
    assert run.used == [1, 0]


@pytest.mark.parametrize("lives", [0, 4])
async def test_an_engine_that_just_stops(lives: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its machine lost its power: no stream ends, but the lease does."""
    monkeypatch.setattr(silence, "SILENT_S", 0.05)
    monkeypatch.setattr(silence, "CHECK_S", 0.01)

    class Hung(FakeEngine):
        async def stream(self, worker: int, wire: Any, context: FakeContext) -> AsyncIterator[Any]:
            items = [item async for item in super().stream(worker, wire, context)]
            for item in items[:lives]:
                yield item
            del run.client.engines[100 + worker]
            await asyncio.Event().wait()

    run = Run(Hung(), FakeEngine())
    assert await run() == ENOUGH
    assert [wanted.failed for wanted in run.router.asked] == [[], [100]]


async def test_an_engine_that_hangs_with_its_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is listed, but the router does not hear of it; one that is heard of may take its time."""
    monkeypatch.setattr(silence, "SILENT_S", 0.05)
    monkeypatch.setattr(silence, "CHECK_S", 0.01)

    class Hung(FakeEngine):
        async def stream(self, worker: int, wire: Any, context: FakeContext) -> AsyncIterator[Any]:
            items = [item async for item in super().stream(worker, wire, context)]
            for item in items[:4]:
                yield item
            await asyncio.sleep(0.2)
            run.states.silent.add(100 + worker)
            await asyncio.Event().wait()

    run = Run(Hung(), FakeEngine())
    assert await run() == ENOUGH
    assert [wanted.failed for wanted in run.router.asked] == [[], [100]]


async def test_a_stream_that_just_ends() -> None:
    class Short(FakeEngine):
        async def stream(self, worker: int, wire: Any, context: FakeContext) -> AsyncIterator[Any]:
            items = [item async for item in super().stream(worker, wire, context)]
            for item in items[:4]:
                yield item

    run = Run(Short(), FakeEngine())
    assert await run() == ENOUGH


async def test_a_client_that_leaves_ends_it() -> None:
    """Its engine's stream just ends; another engine has nothing to do."""
    run = Run(FakeEngine(), FakeEngine())
    assert await run(cancel_after=4) == ENOUGH[:4]
    assert run.used == [1, 0]


async def test_a_client_that_leaves_when_the_engine_dies() -> None:
    run = Run(FakeEngine(4), FakeEngine())
    assert await run(cancel_after=4) == ENOUGH[:4]
    assert run.used == [1, 0]


async def test_a_client_that_leaves_while_the_router_is_asked() -> None:
    """The router may have chosen all the same, and must not wait for the end of it."""
    run = Run(FakeEngine(4), FakeEngine())

    def leave() -> None:
        run.context.stopped = len(run.router.asked) == 2

    run.router.on_ask = leave
    assert "The router gave no answer" in str(await run.fails())
    assert run.used == [1, 0]
    assert run.kinds[-1] == ("request/1", 0, "failed")
