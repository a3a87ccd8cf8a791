"""A frontend's Prometheus metrics, under the names of Dynamo's own frontend."""

import time
from collections.abc import AsyncIterator

from common.protocol import TextOutput

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_PREFIX = "dynamo_frontend_"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)


class FrontendMetrics:
    """One set per process, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            _PREFIX + "requests", "Requests by outcome", ["endpoint", "status"], registry=registry
        )
        self._errors = Counter(
            _PREFIX + "errors", "Failed requests by kind", ["kind"], registry=registry
        )
        self.in_flight = 0
        gauge = Gauge(_PREFIX + "inflight_requests", "Requests being answered", registry=registry)
        gauge.set_function(lambda: self.in_flight)
        self._ttft = Histogram(
            _PREFIX + "time_to_first_token_seconds",
            "From the request to the first token",
            buckets=_SECONDS,
            registry=registry,
        )
        self._itl = Histogram(
            _PREFIX + "inter_token_latency_seconds",
            "Between tokens, averaged over the tokens of one chunk",
            buckets=_SECONDS,
            registry=registry,
        )
        self._input = Histogram(
            _PREFIX + "input_sequence_tokens", "Prompt tokens", buckets=_TOKENS, registry=registry
        )
        self._output = Histogram(
            _PREFIX + "output_sequence_tokens",
            "Completion tokens",
            buckets=_TOKENS,
            registry=registry,
        )
        self._cached = Counter(
            _PREFIX + "cached_tokens", "Prompt tokens served from the KV cache", registry=registry
        )

    def start(self, endpoint: str) -> "RequestMetrics":
        """Begin to measure one request; its owner calls `end`."""
        self.in_flight += 1
        return RequestMetrics(self, endpoint)

    def count(self, endpoint: str, status: int, error_kind: str | None) -> None:
        self._requests.labels(endpoint, str(status)).inc()
        if error_kind is not None:
            self._errors.labels(error_kind).inc()

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)


class RequestMetrics:
    """The clock of one request."""

    def __init__(self, metrics: FrontendMetrics, endpoint: str) -> None:
        self._metrics = metrics
        self._endpoint = endpoint
        self._last = time.perf_counter()
        self._first_token_seen = False

    async def observed(self, outputs: AsyncIterator[TextOutput]) -> AsyncIterator[TextOutput]:
        """The same items, taken note of."""
        async for output in outputs:
            self._observe(output)
            yield output

    def _observe(self, output: TextOutput) -> None:
        if output.tokens:
            now = time.perf_counter()
            if self._first_token_seen:
                self._metrics._itl.observe((now - self._last) / output.tokens)
            else:
                self._metrics._ttft.observe(now - self._last)
                self._first_token_seen = True
            self._last = now
        if output.usage is not None:
            self._metrics._input.observe(output.usage.prompt_tokens)
            self._metrics._output.observe(output.usage.completion_tokens)
            self._metrics._cached.inc(output.usage.cached_tokens)

    def end(self, status: int, error_kind: str | None = None) -> None:
        self._metrics.in_flight -= 1
        self._metrics.count(self._endpoint, status, error_kind)
