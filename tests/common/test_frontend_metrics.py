"""What the frontend's metrics say about requests that end in every way."""

from collections.abc import AsyncIterator

from common.frontend_metrics import FrontendMetrics, RequestMetrics
from common.protocol import ErrorInfo, PipelineError, TextOutput, Usage
from common.protocol_agent import AgentEvent, RunEnded, StepEnded, StepStarted, TextDelta

import pytest
from dynamo.prometheus_names import frontend_service, name_prefix
from dynamo.runtime import Context
from prometheus_client.parser import text_string_to_metric_families


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("common.frontend_metrics.time", clock)
    return clock


def samples(metrics: FrontendMetrics) -> dict[str, float]:
    """The samples as `name{value,value}`, without the prefix and the times of creation."""
    return {
        f"{sample.name.removeprefix('dynamo_frontend_')}{{{','.join(sample.labels.values())}}}": (
            sample.value
        )
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


async def feed(
    measured: RequestMetrics, clock: Clock, items: list[tuple[float, TextOutput]]
) -> None:
    async def outputs() -> AsyncIterator[TextOutput]:
        for seconds, output in items:
            clock.now += seconds
            yield output

    async for _ in measured.observed(outputs()):
        pass


async def test_every_token_interval_counts_once(clock: Clock) -> None:
    """A mean or quantile is one over tokens: 4 tokens in a chunk weigh as much as 4 chunks."""
    metrics = FrontendMetrics()
    measured = metrics.start("chat", 1)
    clock.now = 100.0  # a slow upload is no time to first token
    await feed(
        measured,
        clock,
        [
            (0.2, TextOutput(tokens=3)),
            (0.08, TextOutput(tokens=4)),
            (5.0, TextOutput()),
            (1.0, TextOutput(tokens=1, finish_reason="stop", usage=Usage(20, 8, 16))),
        ],
    )
    measured.end(200)
    found = samples(metrics)
    assert found["time_to_first_token_seconds_count{}"] == 1
    assert found["time_to_first_token_seconds_sum{}"] == pytest.approx(0.2)
    name = "inter_token_latency_seconds"
    assert found[f"{name}_count{{}}"] == 5
    assert found[f"{name}_sum{{}}"] == pytest.approx(6.08)
    assert found[f"{name}_bucket{{0.01}}"] == 0
    assert found[f"{name}_bucket{{0.025}}"] == 4
    assert found[f"{name}_bucket{{5.0}}"] == 4
    assert found[f"{name}_bucket{{10.0}}"] == 5
    assert found[f"{name}_bucket{{+Inf}}"] == 5
    assert found["output_tokens_total{}"] == 8
    assert found["output_sequence_tokens_sum{}"] == 8
    assert found["input_sequence_tokens_sum{}"] == 20
    assert found["cached_tokens_sum{}"] == 16
    assert found["requests_total{chat,200}"] == 1


async def test_tokens_of_failed_requests_count(clock: Clock) -> None:
    metrics = FrontendMetrics()
    measured = metrics.start("chat", 1)
    await feed(measured, clock, [(0.1, TextOutput(tokens=2)), (0.1, TextOutput(tokens=5))])
    measured.end(499, "cancelled")
    found = samples(metrics)
    assert found["output_tokens_total{}"] == 7
    assert found["output_sequence_tokens_sum{}"] == 7
    assert found["requests_total{chat,499}"] == 1
    assert found["errors_total{cancelled}"] == 1
    assert found["input_sequence_tokens_count{}"] == 0


async def test_an_agents_run_counts_its_steps() -> None:
    """One that fails in the end has been answered, but is an error."""
    failed = ErrorInfo("overloaded", "full")
    events: list[AgentEvent] = [
        StepStarted(1, 1),
        TextDelta(0, "a"),
        StepEnded(1, Usage(10, 3, 4), 1.0),
        StepStarted(2, 2),
        StepEnded(2, Usage(20, 4, 16), 1.0),
        RunEnded("failed", Usage(30, 7, 20), error=failed),
    ]

    async def run() -> AsyncIterator[AgentEvent]:
        for event in events:
            yield event

    metrics = FrontendMetrics()
    measured = metrics.start("responses", 1)
    assert [event async for event in measured.observed_run(run())] == events
    measured.end(200)
    found = samples(metrics)
    assert found["output_tokens_total{}"] == 7
    assert found["time_to_first_token_seconds_count{}"] == 1
    assert found["input_sequence_tokens_count{}"] == 2
    assert found["cached_tokens_sum{}"] == 20
    assert found["requests_total{responses,200}"] == 1
    assert found["errors_total{overloaded}"] == 1


def test_the_limit_of_requests_in_flight() -> None:
    metrics = FrontendMetrics()
    held = [metrics.start("chat", 2) for _ in range(2)]
    with pytest.raises(PipelineError, match="2 requests are in flight") as refused:
        metrics.start("chat", 2)
    assert refused.value.info.kind == "overloaded"
    assert samples(metrics)["inflight_requests{}"] == 2
    for measured in held:
        measured.end(200)
    found = samples(metrics)
    assert found["inflight_requests{}"] == 0
    assert found["requests_total{chat,200}"] == 2
    assert found["requests_total{chat,429}"] == 1
    assert found["output_sequence_tokens_count{}"] == 0


@pytest.mark.parametrize(
    ("error", "stopped", "status", "kind"),
    [
        (PipelineError("unavailable", ""), False, "503", "unavailable"),
        (PipelineError("unavailable", ""), True, "499", "cancelled"),
        (KeyError(), False, "500", "internal"),
        (GeneratorExit(), False, "499", "cancelled"),
    ],
)
def test_how_a_block_ended(error: BaseException, stopped: bool, status: str, kind: str) -> None:
    metrics, context = FrontendMetrics(), Context("request")
    with metrics.request("chat", 1, context):
        pass
    if stopped:
        context.stop_generating()
    with pytest.raises(type(error)), metrics.request("chat", 1, context):
        raise error
    found = samples(metrics)
    assert found["requests_total{chat,200}"] == 1
    assert found[f"requests_total{{chat,{status}}}"] == 1
    assert found[f"errors_total{{{kind}}}"] == 1
    assert found["inflight_requests{}"] == 0


def test_names_are_those_of_dynamos_frontend() -> None:
    metrics = FrontendMetrics()
    metrics.count("chat", 503, "unavailable")
    known = {name for name in vars(frontend_service).values() if isinstance(name, str)}
    for family in text_string_to_metric_families(metrics.text().decode()):
        name = family.name.removeprefix(f"{name_prefix.FRONTEND}_").removesuffix("_created")
        assert family.name.startswith(name_prefix.FRONTEND)
        assert {name, f"{name}_total"} & known or name == "errors"
        assert family.documentation
