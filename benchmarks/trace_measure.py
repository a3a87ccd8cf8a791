"""One replay of a trace with one policy, and its figures."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from benchmarks.report import GuardError, percentile
from benchmarks.trace import BLOCK_SIZE, TraceRequest
from benchmarks.trace_engine import EngineSettings, Running
from benchmarks.trace_peers import PEERS, PeerRouter, peer_router
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
    """One replay: what came of it.

    `imbalance` is the busiest engine over the mean of all: in time at work or in prompt tokens
    that were computed, whichever is worse. `itl_mean_ms` is between an answer's tokens, and
    `latency_mean_s` to its last one.
    """

    requests: int
    ttft_p50_ms: float
    ttft_p95_ms: float
    ttft_mean_ms: float
    hit_rate: float
    imbalance: float
    waiting_share: float
    itl_mean_ms: float
    latency_mean_s: float
    wall_s: float


def measure(trace: Sequence[TraceRequest], run: Run) -> Figures:
    """Replay the trace once.

    Raises:
        GuardError: the router did not hear of blocks, although some were cached.
        PeerUnavailableError: the policy is a peer's, which cannot be run.
    """
    settings = EngineSettings(cache_blocks=run.cache_blocks)
    requests = arrivals(trace, run.speed, run.seed)
    start = time.perf_counter()
    if run.policy == "bound":
        return bound(requests, settings)
    with router_for(run, settings) as router:
        result = replay(requests, run.workers, settings, lambda: router)
    deaf = isinstance(router, SelectorRouter | PeerRouter) and not router.events_applied
    if deaf and result.hit_rate:
        raise GuardError(f"{run}: blocks were reused, but the router heard of none")
    return figures(result, time.perf_counter() - start)


@contextmanager
def router_for(run: Run, settings: EngineSettings) -> Iterator[Router]:
    if run.policy in PEERS:
        with peer_router(run.policy, run.workers, settings) as router:
            yield router
    elif run.policy == "oracle":
        yield Oracle()
    else:
        policy = load_policy(run.policy)
        yield SelectorRouter(run.policy, policy, run.workers, settings, run.seed)


def figures(result: Replay, wall_s: float) -> Figures:
    ttfts = [ttft * 1e3 for ttft in result.ttfts]
    times = [
        (running.arrived, running.first_token, running.finished)
        for running in result.requests
        if running.first_token is not None and running.finished is not None
    ]
    decode_s = sum(end - first for _, first, end in times)
    intervals = sum(running.request.output_length - 1 for running in result.requests)
    return Figures(
        len(ttfts),
        percentile(ttfts, 0.5),
        percentile(ttfts, 0.95),
        sum(ttfts) / len(ttfts),
        result.hit_rate,
        result.imbalance,
        result.waiting_share(WAIT_S),
        decode_s / max(intervals, 1) * 1e3,
        sum(end - arrived for arrived, _, end in times) / len(times),
        wall_s,
    )


def bound(requests: list[Running], settings: EngineSettings) -> Figures:
    """Every block that was ever computed is cached, and no request waits for another."""
    known: set[int] = set()
    cached = 0
    ttfts: list[float] = []
    latency_s = 0.0
    step_s = (settings.decode_base_ms + settings.decode_ms_per_request) / 1e3
    for running in requests:
        request = running.request
        blocks = request.full_blocks
        hits = next((n for n, block in enumerate(blocks) if block not in known), len(blocks))
        known.update(blocks)
        reused = min(hits * BLOCK_SIZE, request.input_length - 1)
        cached += reused
        seconds = (request.input_length - reused) / settings.prefill_tokens_per_s
        ttfts.append(seconds * 1e3 + settings.decode_base_ms)
        latency_s += ttfts[-1] / 1e3 + (request.output_length - 1) * step_s
    prompts = sum(running.request.input_length for running in requests)
    mean = sum(ttfts) / len(ttfts)
    return Figures(
        requests=len(ttfts),
        ttft_p50_ms=percentile(ttfts, 0.5),
        ttft_p95_ms=percentile(ttfts, 0.95),
        ttft_mean_ms=mean,
        hit_rate=cached / prompts,
        imbalance=1.0,
        waiting_share=0.0,
        itl_mean_ms=step_s * 1e3,
        latency_mean_s=latency_s / len(ttfts),
        wall_s=0.0,
    )
