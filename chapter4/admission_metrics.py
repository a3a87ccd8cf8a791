"""The router's Prometheus metrics: who waits, for how long, who is refused and why.

Names are Dynamo's where it has the metric too (`dynamo.prometheus_names`), so that a dashboard's
queries carry over; labels differ.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

from chapter4.admission import Admission, Ticket
from common.errors import ComponentError
from common.http import http_server, listen
from common.telemetry import log

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

WAITS_S = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class AdmissionMetrics:
    """In a registry of their own, to which other parts of the router may add."""

    def __init__(self, admission: Admission) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Depth(admission))
        self._routed = Counter(
            "dynamo_component_router_requests_started",
            "Requests that were routed",
            registry=self.registry,
        )
        self._refused = Counter(
            "dynamo_router_requests_refused",
            "Requests that were not routed, by reason",
            ["reason"],
            registry=self.registry,
        )
        self._wait = Histogram(
            "dynamo_router_queue_wait_seconds",
            "From a request's arrival until it was routed",
            buckets=WAITS_S,
            registry=self.registry,
        )

    def observe(self, ticket: Ticket) -> None:
        """A request is settled."""
        if ticket.refusal is None:
            self._routed.inc()
            self._wait.observe(ticket.waited_s)
        else:
            self._refused.labels(ticket.refusal).inc()

    def count_cancelled(self) -> None:
        """A client left while its request waited."""
        self._refused.labels("cancelled").inc()

    def app(self) -> Starlette:
        """Serves them at /metrics in Prometheus' text format."""

        async def metrics(request: Request) -> Response:
            text = generate_latest(self.registry)
            return Response(text, media_type="text/plain; version=0.0.4")

        return Starlette(routes=[Route("/metrics", metrics)])


@asynccontextmanager
async def serving_metrics(
    metrics: AdmissionMetrics, host: str, port: int | None
) -> AsyncIterator[None]:
    """Serve them over HTTP for the length of the block; a port of None: not.

    Raises:
        ComponentError: the address is in use or not ours.
    """
    if port is None:
        yield
        return
    try:
        listener = listen(host, port)
    except OSError as error:
        raise ComponentError(f"cannot serve metrics on {host}:{port}: {error}") from error
    async with http_server(metrics.app(), listener) as server:
        log.info("metrics on %s/metrics", server.url)
        yield


class _Depth(Collector):
    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    def collect(self) -> Iterator[GaugeMetricFamily]:
        gauge = GaugeMetricFamily(
            "dynamo_frontend_router_queue_pending_requests",
            "Requests that wait in the router, by priority",
            labels=["priority"],
        )
        for priority, tenants in self._admission.queue.depths().items():
            gauge.add_metric([str(priority)], sum(tenants.values()))
        yield gauge
