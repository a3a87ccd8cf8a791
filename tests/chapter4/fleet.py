"""Engines as chapter 4's router and its policies see them, made by hand."""

from typing import Any

from chapter4.decision import PolicyInUse
from chapter4.selector import Selector
from chapter4.snapshot import RequestView, Snapshot, WorkerView
from chapter4.workers import Worker
from common.protocol_routing import RouteRequest, RoutingHints
from tests.chapter2.fleet import MODEL, load, source

FIRST = 101  # worker 0's instance


def view(worker_id: int = 0, **fields: Any) -> WorkerView:
    """An idle engine with blocks of 16 tokens, for a prompt of ten blocks: 1 s a block."""
    known: dict[str, Any] = {
        "block_size": 16,
        "prompt_blocks": 10.0,
        "overlap_blocks": 0,
        "prefill_tokens_per_s": 16.0,
        "total_blocks": 100,
    }
    return WorkerView(FIRST + worker_id, worker_id, **{**known, **fields})


def snapshot(*workers: WorkerView, **request: Any) -> Snapshot:
    return Snapshot(RequestView(160, **request), workers, now=0.0)


def fleet(policy: str = "agent", engines: int = 2, now: float = 0.0, **info: Any) -> Selector:
    """Idle engines of 100 blocks of 4 tokens: workers 0, 1, ... are instances 101, 102, ..."""
    selector = Selector(PolicyInUse.named(policy))
    for worker_id in range(engines):
        known = source(worker_id)
        for name, value in info.items():
            setattr(known.info, name, value)
        worker = Worker(FIRST + worker_id, known, synced=True, heard=now)
        selector.workers[worker.instance] = worker
        worker.hear(load(), now)
    return selector


def route(tokens: list[int], request_id: str = "", **hints: Any) -> RouteRequest:
    return RouteRequest(tokens, MODEL, request_id=request_id, hints=RoutingHints(**hints))
