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
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.report import (
    argument_parser,
    markdown_table,
    median,
    with_spread,
    write_result,
)
from benchmarks.router_trace_plot import plot
from benchmarks.trace import TraceRequest, load_trace
from benchmarks.trace_engine import EngineSettings
from benchmarks.trace_measure import Figures, Run, measure
from benchmarks.trace_workloads import WORKLOADS, workload
from chapter3.policy_loader import DEFAULT_POLICY, POLICIES

SPEEDS = [0.5, 1.0, 1.25, 1.5, 1.75, 2.0]
CACHE_BLOCKS = [1000, 2000, 4000]
SEEDS = [1, 2, 3]
QUEUED_SHARE = 0.25
NO_PEERS = (DEFAULT_POLICY, "oracle", "bound")
BUILT_IN_REQUESTS = 4000
BUILT_IN_RATE = 10.0  # a second


_trace: list[TraceRequest] = []  # of a worker process


def _remember(trace: list[TraceRequest]) -> None:
    _trace[:] = trace


def _measure(run: Run) -> tuple[Run, Figures]:
    return run, measure(_trace, run)


def measure_all(trace: list[TraceRequest], runs: list[Run]) -> Iterator[tuple[Run, Figures]]:
    """The runs, one a core at a time."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(mp_context=context, initializer=_remember, initargs=(trace,)) as pool:
        for number, (run, found) in enumerate(pool.map(_measure, runs), start=1):
            print(f"\r{number} of {len(runs)} replays", end="", file=sys.stderr, flush=True)
            yield run, found
    print(file=sys.stderr)


def summary(results: Sequence[tuple[Run, Figures]]) -> list[dict[str, Any]]:
    """One row for each policy, speed and cache size: medians over the seeds, and the rounds."""
    grouped: dict[tuple[int, float, str], list[Figures]] = {}
    for run, found in results:
        grouped.setdefault((run.cache_blocks, run.speed, run.policy), []).append(found)
    rows = []
    for (cache_blocks, speed, policy), rounds in grouped.items():
        columns = {key: [asdict(found)[key] for found in rounds] for key in asdict(rounds[0])}
        rows.append(
            {
                "name": policy,
                "speed": speed,
                "cache_blocks": cache_blocks,
                **{key: round(median(values), 4) for key, values in columns.items()},
                "rounds": columns,
            }
        )
    return rows


def comparisons(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours beside the best peer, at the load where that begins to queue, by cache size."""
    found = []
    for cache_blocks in sorted({row["cache_blocks"] for row in rows}):
        for speed in sorted({row["speed"] for row in rows}):
            here = {
                row["name"]: row
                for row in rows
                if (row["cache_blocks"], row["speed"]) == (cache_blocks, speed)
            }
            peers = [row for name, row in here.items() if name not in NO_PEERS]
            if not peers or DEFAULT_POLICY not in here:
                continue
            ours, best = here[DEFAULT_POLICY], min(peers, key=lambda row: row["ttft_mean_ms"])
            if best["waiting_share"] < QUEUED_SHARE:
                continue
            oracle = here.get("oracle")
            found.append(
                {
                    "name": f"{cache_blocks} blocks, {speed:g}x",
                    "best_peer": best["name"],
                    "ttft_p50_ratio": ours["ttft_p50_ms"] / best["ttft_p50_ms"],
                    "ttft_p95_ratio": ours["ttft_p95_ms"] / best["ttft_p95_ms"],
                    "hit_rate_of_oracle": oracle and ours["hit_rate"] / oracle["hit_rate"],
                    "imbalance": ours["imbalance"],
                }
            )
            break
    return found


def table(rows: list[dict[str, Any]]) -> str:
    header = ["cache", "speed", "policy", "TTFT p50 ms", "TTFT p95 ms", "hit rate"]
    header += ["busiest engine", "waited > 50 ms"]
    lines = [
        [
            f"{row['cache_blocks']:,}",
            f"{row['speed']:g}x",
            row["name"],
            with_spread(row["rounds"]["ttft_p50_ms"]),
            with_spread(row["rounds"]["ttft_p95_ms"]),
            f"{row['hit_rate']:.3f}",
            f"{row['imbalance']:.2f}",
            f"{row['waiting_share']:.0%}",
        ]
        for row in rows
    ]
    return markdown_table(header, lines)


def parse_args() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--trace", metavar="FILE", type=Path, help="in Mooncake's format")
    parser.add_argument(
        "--workload",
        choices=tuple(WORKLOADS),
        default="chats",
        help="made by hand, with no --trace",
    )
    parser.add_argument("--workers", type=int, default=16, help="engines (%(default)s)")
    parser.add_argument("--limit", type=int, help="only the trace's first so many requests")
    policies = [*POLICIES, "oracle", "bound"]
    parser.add_argument(
        "--policies", type=lambda text: text.split(","), default=policies, metavar="NAME,NAME",
        help=f"({','.join(policies)})",
    )  # fmt: skip
    parser.add_argument("--speeds", type=_numbers, metavar="X,X", help="of the trace's pace")
    parser.add_argument(
        "--cache-blocks", type=_numbers, metavar="N,N", help="an engine's, of 512 tokens"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the TTFTs here")
    return parser.parse_args()


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def main() -> None:
    args = parse_args()
    if args.trace:
        trace = load_trace(args.trace, args.limit)
    else:
        count = args.limit or BUILT_IN_REQUESTS
        trace = workload(args.workload, 0, count, count / BUILT_IN_RATE)
    quick = args.quick
    speeds = args.speeds or ([1.0, 1.5] if quick else SPEEDS)
    caches = [int(n) for n in args.cache_blocks or ([2000] if quick else CACHE_BLOCKS)]
    grid = product(caches, speeds, args.policies, SEEDS)
    runs = [
        Run(policy, speed, cache_blocks, seed, args.workers)
        for cache_blocks, speed, policy, seed in grid
    ]
    rows = summary(list(measure_all(trace, runs)))
    compared = comparisons(rows)
    print(table(rows))
    for one in compared:
        print(
            f"\n{one['name']}, where {one['best_peer']} begins to queue: {DEFAULT_POLICY} has "
            f"{one['ttft_p50_ratio']:.2f} of its TTFT p50, {one['ttft_p95_ratio']:.2f} of its p95"
        )
    if args.plot is not None:
        plot(rows, args.plot)
    result = {
        "policies": rows,
        "comparisons": compared,
        "trace": args.trace.name if args.trace else args.workload,
        "requests": len(trace),
        "workers": args.workers,
        "engine": asdict(EngineSettings()),
    }
    write_result(args.json, result, "simulated", SEEDS)


if __name__ == "__main__":
    main()
