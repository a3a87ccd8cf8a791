"""What the router believes about an engine, for those who ask."""

from chapter4.selector import Selector
from chapter4.workers import Worker
from common.protocol_routing import RoutedWorkerState


def worker_state(
    selector: Selector, worker: Worker, block_hashes: list[int], now: float
) -> RoutedWorkerState:
    """What is known of an engine; `block_hashes` are passed on."""
    load = selector.active.load(worker.instance)
    return RoutedWorkerState(
        instance_id=worker.instance,
        worker_id=worker.source.info.worker_id,
        model=worker.source.info.model,
        state=worker.state(now),
        blocks=selector.index.block_count(worker.instance),
        metrics=worker.metrics,
        block_hashes=block_hashes,
        active=load.prefill_requests + load.decode_requests,
        health=selector.health.state(worker.instance),
        health_reason=selector.health.why(worker.instance),
        tags=tuple(sorted(worker.tags)),
        role=worker.source.role,
    )
