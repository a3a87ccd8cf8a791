"""Engines as the router and its policies see them, made by hand."""

from typing import Any

from chapter3.decision import PolicyInUse
from chapter3.selector import Selector
from chapter3.snapshot import RequestView, Score, Snapshot, WorkerView
from chapter3.workers import Worker
from common.protocol_router import KvSource
from common.protocol_routing import RouteRequest, RoutingHints
from tests.chapter2.fleet import MODEL, load, source, stored

__all__ = [
    "FIRST",
    "MODEL",
    "add_engine",
    "fixed",
    "fleet",
    "load",
    "route",
    "snapshot",
    "source",
    "stored",
    "view",
]

FIRST = 101  # worker 0's instance


def view(worker_id: int = 0, **fields: Any) -> WorkerView:
    """An idle engine with blocks of 16 tokens, for a prompt of ten blocks."""
    known = {"block_size": 16, "prompt_blocks": 10.0, "overlap_blocks": 0}
    return WorkerView(FIRST + worker_id, worker_id, **{**known, **fields})


def snapshot(*workers: WorkerView, seed: int = 0, **request: Any) -> Snapshot:
    return Snapshot(RequestView(160, **request), workers, now=0.0, seed=seed)


def fixed(*scores: Score) -> PolicyInUse:
    """A policy that always gives these scores."""
    return PolicyInUse("fixed", lambda _: scores)


def fleet(policy: str | PolicyInUse = "kv", engines: int = 2, now: float = 0.0) -> Selector:
    """Idle engines of 100 blocks of 4 tokens: workers 0, 1, ... are instances 101, 102, ..."""
    use = PolicyInUse.named(policy) if isinstance(policy, str) else policy
    selector = Selector(use)
    for worker_id in range(engines):
        add_engine(selector, FIRST + worker_id, source(worker_id), now).hear(load(), now)
    return selector


def add_engine(selector: Selector, instance: int, known: KvSource, now: float = 0.0) -> Worker:
    """An engine that was heard of just now, with nothing cached."""
    worker = Worker(instance, known, synced=True, heard=now)
    selector.workers[instance] = worker
    return worker


def route(
    tokens: list[int], request_id: str = "", *, model: str = MODEL, **fields: Any
) -> RouteRequest:
    hints = RoutingHints(**fields.pop("hints", {}))
    return RouteRequest(tokens, model, request_id=request_id, hints=hints, **fields)
