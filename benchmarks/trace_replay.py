"""A trace replayed against engines in virtual time, routed by chapter 3's own code.

The selector, its index (the runtime's `RadixTree`, fed by the engines' events), its predictions
and the policy are those of the running router; only the clock, the engines and the wires
between are simulated. Load figures reach the router every 50 ms, as from a real engine; events,
first tokens and ends at once.
"""

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from benchmarks.trace import BLOCK_SIZE, TraceRequest
from benchmarks.trace_engine import EngineSettings, Running, TraceEngine
from chapter3.decision import PolicyInUse
from chapter3.selector import Selector
from chapter3.snapshot import Policy, RequestView
from chapter3.workers import Worker
from common.kv import BlockRemoved, BlockStored
from common.protocol import EngineInfo
from common.protocol_router import KvSource

from dynamo.llm import compute_block_hash_for_seq

MODEL = "trace"
METRICS_INTERVAL_S = 0.05
JITTER_S = 1.0


class Router(Protocol):
    """Who chooses the engine, by its number from 0, and hears what engines do."""

    def choose(self, running: Running, engines: Sequence[TraceEngine], now: float) -> int: ...

    def metrics(self, engine: TraceEngine, now: float) -> None: ...

    def first_token(self, running: Running, now: float) -> None: ...

    def finished(self, running: Running, now: float) -> None: ...

    def stored(self, instance: int, request: TraceRequest, first: int) -> None: ...

    def removed(self, instance: int, blocks: list[int]) -> None: ...


class SelectorRouter:
    """Chapter 3's router with a policy."""

    def __init__(
        self, name: str, policy: Policy, workers: int, settings: EngineSettings, seed: int
    ):
        self.selector = Selector(PolicyInUse(name, policy), rng=random.Random(seed))
        self.events_applied = 0
        for instance in range(workers):
            # The tree sees blocks of one token, which is the block's id: the hash of its content.
            info = EngineInfo(
                *(MODEL, "simulated", 2**31, BLOCK_SIZE, settings.cache_blocks, instance),
                max_running=settings.max_running,
            )
            source = KvSource(info, "", "", "")
            self.selector.workers[instance] = Worker(instance, source, synced=True)

    def choose(self, running: Running, engines: Sequence[TraceEngine], now: float) -> int:
        request = running.request
        blocks = request.full_blocks
        view = RequestView(
            prompt_tokens=request.input_length,
            output_tokens=self.selector.mean_output_tokens,
            session=request.session or str(request.hash_ids[0]),
            tenant=request.tenant,
        )
        decision = self.selector.select_for(
            view,
            lambda _: compute_block_hash_for_seq(blocks, 1),
            now,
            model=MODEL,
            request_id=running.id,
        )
        return decision.worker.instance_id

    def metrics(self, engine: TraceEngine, now: float) -> None:
        self.selector.workers[engine.instance].hear(engine.metrics, now)

    def first_token(self, running: Running, now: float) -> None:
        self.selector.active.first_token(running.id, now)

    def finished(self, running: Running, now: float) -> None:
        self.selector.active.finish(running.id, now)
        self.selector.finished(running.request.output_length)

    def stored(self, instance: int, request: TraceRequest, first: int) -> None:
        blocks = request.full_blocks
        parent = blocks[first - 1] if first else None
        event = BlockStored(blocks[first:], parent, blocks[first:], 1)
        self._apply(instance, event)

    def removed(self, instance: int, blocks: list[int]) -> None:
        self._apply(instance, BlockRemoved(blocks))

    def _apply(self, instance: int, event: BlockStored | BlockRemoved) -> None:
        names = self.selector.index.apply(instance, [event])
        self.events_applied += 1
        self.selector.workers[instance].settle(names)


class Oracle:
    """Knows what every engine has cached and has still to do, and how long the answer will be.

    It is greedy: it takes the engine where this request ends first, whatever that costs others.
    """

    def choose(self, running: Running, engines: Sequence[TraceEngine], now: float) -> int:
        for engine in engines:
            engine.advance(now)
        return min(
            range(len(engines)),
            key=lambda number: (
                engines[number].seconds_to_finish(running.request),
                engines[number].busy_s,
            ),
        )

    def metrics(self, engine: TraceEngine, now: float) -> None: ...

    def first_token(self, running: Running, now: float) -> None: ...

    def finished(self, running: Running, now: float) -> None: ...

    def stored(self, instance: int, request: TraceRequest, first: int) -> None: ...

    def removed(self, instance: int, blocks: list[int]) -> None: ...


@dataclass
class Replay:
    """What came of a replay; `routed` has the engine of each request, in the trace's order."""

    requests: list[Running]
    engines: list[TraceEngine]
    routed: list[int] = field(default_factory=list)
    end: float = 0.0

    @property
    def ttfts(self) -> list[float]:
        """Seconds to the first token, sorted."""
        return sorted(
            running.first_token - running.arrived
            for running in self.requests
            if running.first_token is not None
        )

    @property
    def hit_rate(self) -> float:
        """The share of all prompt tokens that were reused."""
        prompts = sum(running.request.input_length for running in self.requests)
        return sum(running.cached_tokens for running in self.requests) / prompts

    def waiting_share(self, longer_than_s: float) -> float:
        """The share of requests whose prompt did not begin to be computed within that time."""
        waited = [
            running
            for running in self.requests
            if running.started is not None and running.started - running.arrived > longer_than_s
        ]
        return len(waited) / len(self.requests)

    @property
    def imbalance(self) -> float:
        """The busiest engine over the mean of all, by what makes the larger difference.

        That is its time at work or the prompt tokens it has computed: an engine that decodes one
        answer is at work as long as one that computes prompts, too.
        """
        busy = [engine.busy_s for engine in self.engines]
        computed = [engine.prefilled_tokens for engine in self.engines]
        return max(max(work) * len(work) / sum(work) for work in (busy, computed))


def arrivals(trace: Sequence[TraceRequest], speed: float, seed: int) -> list[Running]:
    """The trace's requests at `speed` times its pace, each up to a second early or late."""
    rng = random.Random(seed)
    requests = []
    for number, request in enumerate(trace):
        jitter = rng.uniform(-JITTER_S, JITTER_S)
        arrived = max(request.timestamp / 1e3 + jitter, 0.0) / speed
        requests.append(Running(str(number), request, arrived))
    requests.sort(key=lambda running: running.arrived)
    return requests


def replay(
    requests: list[Running],
    workers: int,
    settings: EngineSettings,
    make_router: Callable[[], Router],
    speeds: Sequence[float] = (),
) -> Replay:
    """Run all requests to their end; `speeds` are the engines', 1 being that of `settings`.

    Raises:
        RuntimeError: a request did not end.
    """
    router = make_router()
    engines = [
        TraceEngine(instance, settings.at_speed(speed), router)
        for instance, speed in enumerate(speeds or [1.0] * workers)
    ]
    result = Replay(requests, engines)
    due: list[tuple[float, int]] = []  # a heap of engines' next events; outdated ones stay in
    position = 0
    ticks = [-1] * workers  # at which each engine's figures were last sent

    def send_metrics(engine: TraceEngine, now: float) -> None:
        """Those of the last tick: they have not changed since, or they would have been sent."""
        if (tick := int(now / METRICS_INTERVAL_S)) > ticks[engine.instance]:
            ticks[engine.instance] = tick
            router.metrics(engine, tick * METRICS_INTERVAL_S)

    while True:
        while due and engines[due[0][1]].next_event() > due[0][0] + 1e-9:
            heapq.heappop(due)  # outdated
        arrival = requests[position].arrived if position < len(requests) else float("inf")
        event = due[0][0] if due else float("inf")
        now = min(arrival, event)
        if now == float("inf"):
            break
        if event <= arrival:
            engine = engines[heapq.heappop(due)[1]]
            send_metrics(engine, now)
            engine.advance(now)
            engine.happen()
        else:
            running = requests[position]
            position += 1
            for engine in engines:
                send_metrics(engine, now)
            engine = engines[router.choose(running, engines, now)]
            result.routed.append(engine.instance)
            engine.advance(now)
            engine.submit(running)
        if (following := engine.next_event()) < float("inf"):
            heapq.heappush(due, (following, engine.instance))
        result.end = now
    unfinished = sum(1 for running in requests if running.finished is None)
    if unfinished:
        raise RuntimeError(f"{unfinished} of {len(requests)} requests did not end")
    return result
