"""Routing policies on a recorded trace, in virtual time: TTFT, hit rate and balance, simulated.

    python -m benchmarks.router_trace --trace FILE --json FILE --plot FILE.png

The trace is in Mooncake's format (`benchmarks.trace`); without one, it is one made by hand
(`benchmarks.trace_workloads`). Engines follow the timing model of `benchmarks.trace_engine`,
all alike. The policies are those of chapter 3, with its router around them, functions of yours
(`path.py:function`), and what they are measured against:

- `KvRouter`, `SelectionService`: Dynamo's own, in this process, given the same events;
- `oracle`: knows each engine's cache and work, and each answer's length; takes the engine where
  the request ends first;
- `bound`: an infinite cache that all engines share, and no queue.

The load at which the best peer begins to queue is the first at which a quarter of its requests
wait for more than 50 ms before their prompt is computed.
"""

import argparse
import asyncio
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.report import argument_parser, write_result
from benchmarks.router_peers import PeerUnavailableError
from benchmarks.router_trace_plot import plot
from benchmarks.trace import TraceRequest, load_trace
from benchmarks.trace_engine import EngineSettings
from benchmarks.trace_measure import Figures, Run, measure
from benchmarks.trace_peers import PEERS
from benchmarks.trace_summary import check, comparisons, summary, table
from benchmarks.trace_workloads import WORKLOADS, workload
from chapter3.policy_loader import DEFAULT_POLICY, POLICIES, load_policy
from launch.children import Children
from launch.errors import LaunchError
from launch.servers import nats_server

SPEEDS = [0.5, 1.0, 1.25, 1.5, 2.0]
CACHE_BLOCKS = [1000, 2000, 4000]
SEEDS = [1, 2, 3]
QUICK_SPEEDS = [1.0, 1.5]
QUICK_CACHE_BLOCKS = [2000]
QUICK_SEEDS = [1]
BUILT_IN_REQUESTS = 4000
# Requests a second that keep 16 engines at work for 0.5 to 0.75 of the time.
BUILT_IN_RATES = {"chats": 12.0, "documents": 16.0, "mixed": 4.0}


Load = Callable[[], list[TraceRequest]]

_trace: list[TraceRequest] = []  # of a worker process


def _remember(load: Load) -> None:
    _trace[:] = load()


def _measure(run: Run) -> Figures | str:
    try:
        return measure(_trace, run)
    except PeerUnavailableError as error:
        return str(error)


def measure_all(load: Load, runs: list[Run], left_out: dict[str, str]) -> list[tuple[Run, Figures]]:
    """The runs, one a core at a time; of a peer that one of them lacks, all are left out.

    Each process loads the trace itself: one that is interrupted while it is handed something
    large would never be missed.
    """
    context = multiprocessing.get_context("spawn")
    results: list[tuple[Run, Figures]] = []
    with ProcessPoolExecutor(mp_context=context, initializer=_remember, initargs=(load,)) as pool:
        try:
            for run, found in zip(runs, pool.map(_measure, runs), strict=True):
                if isinstance(found, str):
                    left_out[run.policy] = found
                else:
                    results.append((run, found))
                done = len(results) + len(left_out)
                print(f"\r{done} of {len(runs)} replays", end="", file=sys.stderr, flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # else the rest is run before it ends
            raise
    print(file=sys.stderr)
    return [(run, found) for run, found in results if run.policy not in left_out]


def run_all(load: Load, runs: list[Run], left_out: dict[str, str]) -> list[tuple[Run, Figures]]:
    """`measure_all`, with a NATS server if one of the runs needs it."""
    if not any(run.policy == "KvRouter" for run in runs):
        return measure_all(load, runs, left_out)
    try:
        return asyncio.run(with_nats(lambda: measure_all(load, runs, left_out)))
    except LaunchError as error:
        left_out["KvRouter"] = str(error)
        return measure_all(load, [run for run in runs if run.policy != "KvRouter"], left_out)


async def with_nats(work: Callable[[], Any]) -> Any:
    """What `work` returns; meanwhile there is a NATS server, by which KvRouter hears of events.

    Raises:
        LaunchError: it does not start.
    """
    with Children() as children:
        async with nats_server(children) as nats:
            os.environ["NATS_SERVER"] = nats.url
            # It logs an error for everything that a runtime watched when it is shut down.
            os.environ["DYN_LOG"] += ",dynamo_runtime::storage::kv=off"
            return await asyncio.to_thread(work)


def parse_args() -> argparse.Namespace:
    """The arguments; `load` gives the trace that they name, of `requests` requests."""
    parser = argument_parser(__doc__)
    parser.add_argument("--trace", metavar="FILE", type=Path, help="in Mooncake's format")
    parser.add_argument(
        "--workload",
        choices=tuple(WORKLOADS),
        default="chats",
        help="made by hand, with no --trace (%(default)s)",
    )
    parser.add_argument("--workers", type=_count, default=16, help="engines (%(default)s)")
    parser.add_argument(
        "--limit", type=_count, metavar="N", help="only the trace's first N requests"
    )
    policies = [*POLICIES, *PEERS, "oracle", "bound"]
    parser.add_argument(
        "--policies", type=lambda text: text.split(","), default=policies, metavar="NAME,NAME",
        help=f"({','.join(policies)})",
    )  # fmt: skip
    parser.add_argument("--speeds", type=_list_of(float), metavar="X,X", help="of the trace's pace")
    parser.add_argument(
        "--cache-blocks", type=_list_of(int), metavar="N,N", help="an engine's, of 512 tokens"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the TTFTs here")
    args = parser.parse_args()
    args.speeds = args.speeds or (QUICK_SPEEDS if args.quick else SPEEDS)
    args.cache_blocks = args.cache_blocks or (QUICK_CACHE_BLOCKS if args.quick else CACHE_BLOCKS)
    args.seeds = QUICK_SEEDS if args.quick else SEEDS
    try:
        for name in set(args.policies) - {*PEERS, "oracle", "bound"}:
            load_policy(name)
        args.load = partial(load_trace, args.trace, args.limit)
        if not args.trace:
            count = args.limit or BUILT_IN_REQUESTS
            seconds = count / BUILT_IN_RATES[args.workload]
            args.load = partial(workload, args.workload, 0, count, seconds)
        args.requests = len(args.load())
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if not args.requests:
        parser.error(f"{args.trace} has no requests")
    return args


def _count(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def _list_of(kind: type[int] | type[float]) -> Callable[[str], list[float]]:
    def numbers(text: str) -> list[float]:
        values = [kind(part) for part in text.split(",")]
        if not all(0 < value < float("inf") for value in values):
            raise argparse.ArgumentTypeError(f"{text}: all must be above 0")
        return values

    return numbers


def main() -> None:
    args = parse_args()
    left_out: dict[str, str] = {}
    grid = product(args.cache_blocks, args.speeds, args.policies, args.seeds)
    runs = [
        Run(policy, speed, cache_blocks, seed, args.workers)
        for cache_blocks, speed, policy, seed in grid
    ]
    results = run_all(args.load, runs, left_out)
    check(results, args.requests)
    rows = summary(results)
    compared = comparisons(rows)
    print(table(rows))
    for policy, reason in left_out.items():
        print(f"\nLeft out: {policy}: {reason}")
    for one in compared:
        print(
            f"\n{one['name']}, where {one['best_peer']}, the best peer, begins to queue: "
            f"{DEFAULT_POLICY} has {one['ttft_p50_ratio']:.2f} of the peers' lowest TTFT p50, "
            f"{one['ttft_p95_ratio']:.2f} of their lowest p95"
        )
    name = args.trace.name if args.trace else args.workload
    if args.plot is not None:
        plot(rows, args.plot, f"{name} on {args.workers} engines")
    result = {
        "policies": rows,
        "comparisons": compared,
        "left_out": left_out,
        "trace": name,
        "requests": args.requests,
        "workers": args.workers,
        "engine": asdict(EngineSettings()),
    }
    write_result(args.json, result, "simulated", args.seeds)


if __name__ == "__main__":
    main()
