"""What it is worth that the router knows what agents do: the time of their tasks, with and without.

    python -m benchmarks.agent --json FILE [--quick] [--simulated] [--crowd SHARE]

Agents with scripts, not models, do tasks of some steps; while a tool runs, a crowd of single
questions takes their place in the caches and in the queue. That is the load at which it matters:
half of what an engine has cached would do for its agents, the crowd fills the other half in about
the time that a tool takes, and its prompts alone keep the engines busy for half of the time, or
`--crowd` of it. (How fast they are when all are at work is measured at the beginning.) With less
of a crowd little is evicted, nobody waits, and all policies are alike; with much more of it all
queues grow for ever, those of the policy that computes more than once first.

Chapter 4's pipeline routes all of it, once with the policy of chapter 3 and no hints, once with
the policy `agent` and the agents' hints. Every run begins with empty caches. The cached share is
that of the agents' steps, by what the engines say; the oracle is one endless cache. If a run is
not what it should be, no ratio is printed.
"""

import argparse
import asyncio
import os
import random
import sys
from dataclasses import replace
from typing import Any

from benchmarks.agent_pipeline import Engines, bench
from benchmarks.agent_run import PROBE_TOKENS, Contender, Run, contender, probe, run
from benchmarks.agent_workload import Size, crowd_per_s, oracle_share, workload
from benchmarks.report import (
    GuardError,
    argument_parser,
    markdown_table,
    median,
    with_spread,
    write_result,
)
from common.model_files import DEFAULT_MODEL
from common.text import load_text_model
from launch.child import ChildFailedError

CONTENDERS = "earliest_start,agent"
BAR_TIME, BAR_SHARE = 0.85, 0.95

REAL = Engines("llamacpp", 2, 1408, ("threads=1", "batch_threads=1", "max_running=2"))
FULL = Size(
    agents=4,
    tasks=1,
    steps=(6, 12),
    tool_s=(4.0, 8.0),
    system=96,
    task=(16, 32),
    said=12,
    returned=(12, 20),
    answer=24,
    crowd_share=0.5,
    crowd_prompt=(192, 320),
    crowd_answer=16,
    alone_s=12.0,
)
QUICK = replace(FULL, steps=(3, 4))

SIMULATED = Engines(
    "simulated",
    4,
    65_536,
    ("prefill_tokens_per_s=4000", "decode_base_ms=15", "max_running=8", "context_length=32768"),
)
SIMULATED_FULL = Size(
    agents=16,
    tasks=1,
    steps=(6, 12),
    tool_s=(8.0, 24.0),
    system=2048,
    task=(256, 1024),
    said=32,
    returned=(400, 1200),
    answer=64,
    crowd_share=0.8,
    crowd_prompt=(1024, 3072),
    crowd_answer=64,
    alone_s=25.0,
)
SIMULATED_QUICK = replace(SIMULATED_FULL, agents=12, steps=(3, 4), tool_s=(6.0, 12.0), alone_s=15.0)

Rounds = dict[str, list[Run]]


async def measure(
    engines: Engines, size: Size, seeds: list[int], contenders: list[Contender]
) -> tuple[Rounds, list[float]]:
    """The runs by contender, one a seed, and the oracle's shares."""
    text = load_text_model(DEFAULT_MODEL)
    found: Rounds = {who.name: [] for who in contenders}
    shares = []
    async with bench(engines, text.name) as running:
        probes = await probe(running, text, random.Random(0))
        per_s = crowd_per_s(size, sum(PROBE_TOKENS / seconds for seconds in probes))
        print(f"the crowd asks {per_s:.2f} questions a second", file=sys.stderr)
        for seed in seeds:
            load = workload(text, size, seed, per_s)
            shares.append(oracle_share(load.steps, engines.block_size))
            order = list(contenders)
            random.Random(seed).shuffle(order)  # the machine's speed drifts
            for who in order:
                result = await run(running, who, load, text)
                found[who.name].append(result)
                figures = ", ".join(f"{key} {value:.3g}" for key, value in result.figures.items())
                print(f"seed {seed}: {who.name}: {figures}", file=sys.stderr)
                for fault in result.faults:
                    print(f"seed {seed}: {who.name}: {fault}", file=sys.stderr)
    return found, shares


def summary(found: Rounds, shares: list[float]) -> list[dict[str, Any]]:
    rows = []
    for name, runs in found.items():
        rounds = {key: [run.figures[key] for run in runs] for key in runs[0].figures}
        of_oracle = [c / o for c, o in zip(rounds["cached_share"], shares, strict=True)]
        rows.append(
            {
                "name": name,
                **{key: round(median(values), 4) for key, values in rounds.items()},
                "oracle_share": round(median(shares), 4),
                "of_oracle": round(median(of_oracle), 4),
                "rounds": {**rounds, "of_oracle": of_oracle},
                "faults": [fault for run in runs for fault in run.faults],
            }
        )
    return rows


def ratio(rows: list[dict[str, Any]]) -> float | None:
    """The last contender's task p50 over the first's, seed by seed; None: not to be compared."""
    first, last = rows[0], rows[-1]
    if any(row["faults"] for row in rows):
        return None
    pairs = zip(last["rounds"]["task_p50_s"], first["rounds"]["task_p50_s"], strict=True)
    return median([after / before for after, before in pairs])


def table(rows: list[dict[str, Any]]) -> str:
    columns = {
        "task p50 s": ("task_p50_s", 1),
        "p95 s": ("task_p95_s", 1),
        "TTFT of a step p50 ms": ("ttft_p50_ms", 0),
        "p95 ms": ("ttft_p95_ms", 0),
        "cached share": ("cached_share", 3),
        "of the oracle's": ("of_oracle", 3),
        "the crowd's TTFT p50 ms": ("crowd_ttft_p50_ms", 0),
        "p95 ms ": ("crowd_ttft_p95_ms", 0),
    }
    lines = [
        [
            row["name"],
            *(with_spread(row["rounds"][key], digits) for key, digits in columns.values()),
        ]
        for row in rows
    ]
    return markdown_table(["policy", *columns], lines)


def verdict(rows: list[dict[str, Any]]) -> str:
    """Whether the bar is met, or why nothing can be said."""
    found, last = ratio(rows), rows[-1]
    if found is None:
        faults = [f"{row['name']}: {fault}" for row in rows for fault in row["faults"]]
        return "no comparison: " + "; ".join(faults)
    return (
        f"task p50: {found:.3f} of {rows[0]['name']}'s (the bar: at most {BAR_TIME}); cached "
        f"share: {last['of_oracle']:.3f} of the oracle's (the bar: at least {BAR_SHARE})"
    )


def parse_args() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--simulated", action="store_true", help="more agents and engines, no model"
    )
    parser.add_argument(
        "--crowd",
        type=float,
        metavar="SHARE",
        help=f"how busy the crowd's prompts keep the engines ({FULL.crowd_share} of the time, "
        f"simulated {SIMULATED_FULL.crowd_share})",
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="(%(default)s)")
    parser.add_argument(
        "--contenders",
        default=CONTENDERS,
        metavar="NAME,NAME",
        help="policies of chapter 4's router; agents give hints with `agent` and with NAME+hints; "
        "the last is compared with the first (%(default)s)",
    )
    args = parser.parse_args()
    if args.crowd is not None and not 0 < args.crowd < 2:
        parser.error(f"--crowd: {args.crowd} is no share above 0 and below 2")
    return args


def silence_runtime() -> None:
    """Else the runtime writes a line for each hop of each request to the standard error."""
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    os.close(nothing)


def main() -> None:
    args = parse_args()
    silence_runtime()
    engines = SIMULATED if args.simulated else REAL
    if args.quick:  # shorter tasks, so less to keep
        engines = replace(engines, cache_tokens=engines.cache_tokens * 2 // 3)
    full, quick = (SIMULATED_FULL, SIMULATED_QUICK) if args.simulated else (FULL, QUICK)
    size = quick if args.quick else full
    if args.crowd is not None:
        size = replace(size, crowd_share=args.crowd)
    seeds = list(range(1, (1 if args.quick else args.seeds) + 1))
    contenders = [contender(name) for name in args.contenders.split(",")]
    try:
        rows = summary(*asyncio.run(measure(engines, size, seeds, contenders)))
    except* (GuardError, ChildFailedError) as errors:
        raise SystemExit(f"no result: {errors.exceptions[0]}") from errors
    print(table(rows))
    print(f"\n{verdict(rows)}")
    compared = ratio(rows)
    document = {
        "policies": rows,
        "ratio": compared,
        "engines": engines.__dict__,
        "size": size.__dict__,
    }
    write_result(args.json, document, "simulated" if args.simulated else "measured", seeds)
    if compared is None:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
