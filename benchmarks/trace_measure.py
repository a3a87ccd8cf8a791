"""One replay of a trace with one policy, and its figures."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.report import GuardError, percentile
from benchmarks.trace import BLOCK_SIZE, TraceRequest
from benchmarks.trace_engine import EngineSettings, Running
from benchmarks.trace_replay import Oracle, Replay, Router, SelectorRouter, arrivals, replay
from chapter3.policy_loader import load_policy

WAIT_S = 0.05


@dataclass(frozen=True)
class Run:
    """One replay: what to run."""

    policy: str
    speed: float
    cache_blocks: int
    seed: int
    workers: int


@dataclass(frozen=True)
class Figures:
    """One replay: what came of it."""

    ttft_p50_ms: float
    ttft_p95_ms: float
    ttft_mean_ms: float
    hit_rate: float
    imbalance: float
    waiting_share: float
    wall_s: float


def measure(trace: Sequence[TraceRequest], run: Run) -> Figures:
    """Replay the trace once.

    Raises:
        GuardError: the router did not hear of blocks, although some were cached.
    """
    settings = EngineSettings(cache_blocks=run.cache_blocks)
    requests = arrivals(trace, run.speed, run.seed)
    start = time.perf_counter()
    if run.policy == "bound":
        return bound(requests, settings)
    router = router_for(run, settings)
    result = replay(requests, run.workers, settings, lambda: router)
    if isinstance(router, SelectorRouter) and result.hit_rate and not router.events_applied:
        raise GuardError(f"{run}: blocks were reused, but the router heard of none")
    return figures(result, time.perf_counter() - start)


def router_for(run: Run, settings: EngineSettings) -> Router:
    if run.policy == "oracle":
        return Oracle()
    return SelectorRouter(run.policy, load_policy(run.policy), run.workers, settings, run.seed)


def figures(result: Replay, wall_s: float) -> Figures:
    ttfts = [ttft * 1e3 for ttft in result.ttfts]
    return Figures(
        percentile(ttfts, 0.5),
        percentile(ttfts, 0.95),
        sum(ttfts) / len(ttfts),
        result.hit_rate,
        result.imbalance,
        result.waiting_share(WAIT_S),
        wall_s,
    )


def bound(requests: list[Running], settings: EngineSettings) -> Figures:
    """Every block that was ever computed is cached, and no request waits for another."""
    known: set[int] = set()
    cached = 0
    ttfts: list[float] = []
    for running in requests:
        request = running.request
        blocks = request.full_blocks
        hits = next((n for n, block in enumerate(blocks) if block not in known), len(blocks))
        known.update(blocks)
        reused = min(hits * BLOCK_SIZE, request.input_length - 1)
        cached += reused
        seconds = (request.input_length - reused) / settings.prefill_tokens_per_s
        ttfts.append(seconds * 1e3 + settings.decode_base_ms)
    prompts = sum(running.request.input_length for running in requests)
    mean = sum(ttfts) / len(ttfts)
    return Figures(
        percentile(ttfts, 0.5), percentile(ttfts, 0.95), mean, cached / prompts, 1.0, 0.0, 0.0
    )
