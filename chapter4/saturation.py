"""Whether an engine has as much to do as it should be given.

What an engine has been sent stands in its own queue, first come first served. What waits in the
router can still be put in order, and go to whichever engine has room first. So when all engines
have a little more than they can run, just enough that none waits for the router, they get nothing
more. While one has room, the policy chooses among all of them, as in Dynamo: it may prefer one
without for what is cached there.
"""

from dataclasses import dataclass

from chapter4.engine_load import EngineLoad
from chapter4.workers import Worker


@dataclass(frozen=True)
class Limits:
    """An engine is saturated that has one of these.

    `engine_queue` requests more than it runs at once; running requests that hold more than
    `kv_usage` (0 to 1) of its blocks; prompts that take longer than `prefill_s` to compute.
    """

    engine_queue: int = 1
    kv_usage: float = 0.95
    prefill_s: float = 2.0


def is_saturated(worker: Worker, load: EngineLoad, limits: Limits, now: float) -> bool:
    """Whether the engine has reached a limit; one that has nothing to do never has."""
    metrics = worker.metrics
    if metrics is None:
        requests = in_flight = load.prefill_requests + load.decode_requests
        waiting, kv_usage, max_running = 0, 0.0, worker.source.info.max_running
    else:
        # The engine's figures lack what is on its way there; our count has what was never
        # reported to have ended. Neither is too low, so the lower one is nearer the truth.
        requests = metrics.running + metrics.waiting + worker.routed_requests
        in_flight = min(requests, load.prefill_requests + load.decode_requests)
        waiting = metrics.waiting
        kv_usage = metrics.used_blocks / max(metrics.total_blocks, 1)
        max_running = worker.source.info.max_running
    if requests == 0:
        return False
    if max_running is not None and in_flight >= max_running + limits.engine_queue:
        return True
    if waiting >= max(limits.engine_queue, 1) or kv_usage > limits.kv_usage:
        return True
    return load.prefill_s(now) > limits.prefill_s
