"""A frontend's Prometheus metrics.

Names, types and meanings are those of Dynamo's own frontend where it has the metric too
(`dynamo.prometheus_names.frontend_service`), so that a dashboard's queries carry over. Labels
differ: there is no `model`, as a frontend here serves one, and `status` is the HTTP status.
`errors_total` is ours.
"""

import contextlib
import itertools
import time
from bisect import bisect_left
from collections.abc import AsyncIterator, Iterator

from common.http_errors import CANCELLED, outcome
from common.protocol import PipelineError, TextOutput
from common.protocol_agent import AgentEvent, CallDelta, RunEnded, StepEnded, TextDelta

from dynamo.runtime import Context
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

_PREFIX = "dynamo_frontend_"
_SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)


class FrontendMetrics:
    """One set per process, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.in_flight = 0
        self._requests = self._counter("requests", "Requests by outcome", "endpoint", "status")
        self._errors = self._counter("errors", "Failed requests by kind", "kind")
        self.output_tokens = self._counter("output_tokens", "Completion tokens, as they come")
        self.ttft = self._histogram(
            "time_to_first_token_seconds", "From the whole request to the first token", _SECONDS
        )
        self.itl = _InterTokenLatency()
        self.registry.register(self.itl)
        self.input_length = self._histogram(
            "input_sequence_tokens", "Prompt tokens of a request that was answered", _TOKENS
        )
        self.output_length = self._histogram(
            "output_sequence_tokens", "Completion tokens of a request that got any", _TOKENS
        )
        self.cached_tokens = self._histogram(
            "cached_tokens", "Prompt tokens of a request served from the KV cache", _TOKENS
        )
        Gauge(
            _PREFIX + "inflight_requests",
            "Requests being received or answered",
            registry=self.registry,
        ).set_function(lambda: self.in_flight)

    def start(self, endpoint: str, max_in_flight: int) -> "RequestMetrics":
        """Begin to measure one request; its owner calls `end`.

        Raises:
            PipelineError: kind `overloaded`; the refusal is counted.
        """
        if self.in_flight >= max_in_flight:
            self.count(endpoint, 429, "overloaded")
            message = f"{max_in_flight} requests are in flight; try again later."
            raise PipelineError("overloaded", message)
        self.in_flight += 1
        return RequestMetrics(self, endpoint)

    @contextlib.contextmanager
    def request(
        self, endpoint: str, max_in_flight: int, context: Context
    ) -> Iterator["RequestMetrics"]:
        """`start` for the length of a block, whose exception says how the request ended.

        Raises:
            PipelineError: as `start`.
        """
        measured = self.start(endpoint, max_in_flight)
        try:
            yield measured
        except BaseException as error:
            measured.end(*(CANCELLED if context.is_stopped() else outcome(error)))
            raise
        measured.end(200)

    def count(self, endpoint: str, status: int, error_kind: str | None) -> None:
        self._requests.labels(endpoint, str(status)).inc()
        if error_kind is not None:
            self._errors.labels(error_kind).inc()

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(_PREFIX + name, meaning, labels, registry=self.registry)

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(_PREFIX + name, meaning, buckets=buckets, registry=self.registry)


class _InterTokenLatency(Collector):
    """A histogram that takes many equal observations at the price of one."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_SECONDS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float, times: int) -> None:
        self._counts[bisect_left(_SECONDS, seconds)] += times
        self._sum += seconds * times

    def collect(self) -> Iterator[HistogramMetricFamily]:
        bounds = [*map(str, _SECONDS), "+Inf"]
        buckets = list(zip(bounds, itertools.accumulate(self._counts), strict=True))
        yield HistogramMetricFamily(
            _PREFIX + "inter_token_latency_seconds", "Between tokens", buckets, self._sum
        )


class RequestMetrics:
    """What is measured of one request, also of one that is cancelled or fails half-way.

    A chunk of k tokens that comes t seconds after the one before counts as k intervals of t/k,
    and the first chunk counts for the time to first token alone, whatever its tokens; so does
    Dynamo's frontend (`observe_response` in its `http/service/metrics.rs`).
    """

    def __init__(self, metrics: FrontendMetrics, endpoint: str) -> None:
        self._metrics = metrics
        self._endpoint = endpoint
        self._last = 0.0
        self._tokens = 0
        self._run_failed: str | None = None

    async def observed(self, outputs: AsyncIterator[TextOutput]) -> AsyncIterator[TextOutput]:
        """The same items, taken note of; the clock starts when the first one is asked for."""
        self._last = time.perf_counter()
        async for output in outputs:
            self._observe(output)
            yield output

    def _observe(self, output: TextOutput) -> None:
        metrics = self._metrics
        if output.tokens:
            now = time.perf_counter()
            if self._tokens:
                metrics.itl.observe((now - self._last) / output.tokens, output.tokens)
            else:
                metrics.ttft.observe(now - self._last)
            self._last = now
            self._tokens += output.tokens
            metrics.output_tokens.inc(output.tokens)
        if output.usage is not None:
            metrics.input_length.observe(output.usage.prompt_tokens)
            metrics.cached_tokens.observe(output.usage.cached_tokens)

    async def observed_run(self, events: AsyncIterator[AgentEvent]) -> AsyncIterator[AgentEvent]:
        """As `observed`, of an agent's run: its tokens count when their step has ended.

        The time to the first token is the run's, and there is none between tokens. A run that
        failed after its beginning has the status 200 and an error.
        """
        began, first = time.perf_counter(), False
        metrics = self._metrics
        async for event in events:
            if isinstance(event, TextDelta | CallDelta) and not first:
                metrics.ttft.observe(time.perf_counter() - began)
                first = True
            elif isinstance(event, StepEnded):
                self._tokens += event.usage.completion_tokens
                metrics.output_tokens.inc(event.usage.completion_tokens)
                metrics.input_length.observe(event.usage.prompt_tokens)
                metrics.cached_tokens.observe(event.usage.cached_tokens)
            elif isinstance(event, RunEnded) and event.error is not None:
                self._run_failed = event.error.kind
            yield event

    def end(self, status: int, error_kind: str | None = None) -> None:
        self._metrics.in_flight -= 1
        self._metrics.count(self._endpoint, status, error_kind or self._run_failed)
        if self._tokens:
            self._metrics.output_length.observe(self._tokens)
