"""What it is worth to compute prompts on another engine: the same two engines, in three modes.

    python -m benchmarks.disagg --json FILE

(a) aggregated: both engines compute prompts and generate, behind chapter 3's best router
(earliest_start). (b) disaggregated: one computes every prompt, the other generates. (c)
conditional: as (b), but prompts below the router's default threshold are computed where they are
answered. The engines are real ones (llama.cpp, the default model), of one thread each, so that
two of them have two cores; with --simulated they take the time of large GPUs (see
`disagg_engines`), and all around them is real. Long prompts arrive while short chats are answered;
every mode gets the same requests at the same times (open loop), at a load at which some engine
works for 30% of the time or more, and none works always while requests pile up. Each run begins
with new engines, warmed up, with empty caches. A seed runs all modes before the next seed does,
in an order that changes.

The engines that decode have their best prefill chunk size, found by the same rule in (a) and (c):
of the sizes tried (all are shown), the one with the lowest ITL p99 among those with at least 0.9
times the best throughput and at most 2 times the best TTFT p95. The best is chosen on the runs
that are reported, which flatters (a), with the most sizes, most. The engine of (b) and (c) that
computes prompts has a large one, as nobody waits for it.

ITL is what the client sees: the time between two events with text, over all answers. An event
with several tokens ends one gap, and its other tokens have none.
"""

import argparse
import asyncio
import dataclasses
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.disagg_engines import REAL, SIMULATED, Engines
from benchmarks.disagg_pipeline import Mode, bench
from benchmarks.disagg_plot import plot
from benchmarks.disagg_records import CAUSES, PARTS, medians
from benchmarks.disagg_run import Run, load_faults, run
from benchmarks.disagg_workload import arrivals
from benchmarks.report import argument_parser, markdown_table, median, with_spread, write_result
from chapter3.disaggregation import DEFAULT_MIN_TOKENS
from common.model_files import DEFAULT_MODEL
from common.text import load_text_model

AGGREGATED, DISAGGREGATED, CONDITIONAL = "aggregated", "disaggregated", "conditional"
NAMES = (AGGREGATED, DISAGGREGATED, CONDITIONAL)
QUICK_SECONDS = 15.0
MIN_THROUGHPUT = 0.9  # of the best one
MAX_TTFT = 2.0  # of the best one
BAR = 0.5  # ITL p99, of the aggregated engines'


def modes(engines: Engines, quick: bool) -> list[Mode]:
    """Everything that is run."""
    aggregated = engines.quick_chunks if quick else engines.chunks
    conditional = engines.conditional_chunks[: 1 if quick else None]
    return [
        *(Mode(AGGREGATED, chunk) for chunk in aggregated),
        Mode(DISAGGREGATED, conditional[0], remote_tokens=0),
        *(Mode(CONDITIONAL, chunk, DEFAULT_MIN_TOKENS) for chunk in conditional),
    ]


async def measure(
    engines: Engines, seeds: list[int], seconds: float, load: float, todo: list[Mode]
) -> dict[Mode, list[Run]]:
    """The runs of every mode, one a seed."""
    text = load_text_model(DEFAULT_MODEL)
    found: dict[Mode, list[Run]] = {mode: [] for mode in todo}
    async with bench(engines) as running:
        for seed in seeds:
            requests = arrivals(text, seed, seconds, engines.shapes, load)
            for mode in random.Random(seed).sample(todo, len(todo)):
                result = await run(running, mode, requests, text)
                found[mode].append(result)
                print(f"seed {seed}: {mode.name}, chunk {mode.chunk}: {_line(result)}",
                      file=sys.stderr)  # fmt: skip
    return found


def _line(result: Run) -> str:
    names = ["itl_p50_ms", "itl_p99_ms", "ttft_p95_ms", "throughput_tokens_per_s"]
    names += ["busy_engine0", "busy_engine1", "cores_others"]
    line = ", ".join(f"{name} {result.figures[name]:.3g}" for name in names)
    return "; ".join([line, *result.faults])


def rows(found: dict[Mode, list[Run]]) -> list[dict[str, Any]]:
    """One for every mode and chunk size: medians over the seeds, and the rounds themselves."""
    result = []
    for mode, runs in found.items():
        rounds = {name: [run.figures[name] for run in runs] for name in runs[0].figures}
        figures = {name: round(median(values), 4) for name, values in rounds.items()}
        faults = [fault for run in runs for fault in run.faults]
        result.append(
            {
                "name": mode.name,
                "prefill_chunk": mode.chunk,
                **figures,
                "itl_p99_from": {
                    cause: round(sum(run.causes[cause] for run in runs) / len(runs), 3)
                    for cause in CAUSES
                },
                "handover_ms": medians(parts for run in runs for parts in run.handovers),
                "faults": sorted(set(faults)),
                "tokens": [sum(run.tokens) for run in runs],
                "rounds": rounds,
            }
        )
    return result


def best(sweep: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The row of the best chunk size of a mode; see above for what is best."""
    tried = [row for row in sweep if row["name"] == name]
    throughput = max(row["throughput_tokens_per_s"] for row in tried)
    ttft = min(row["ttft_p95_ms"] for row in tried)
    allowed = [
        row
        for row in tried
        if row["throughput_tokens_per_s"] >= MIN_THROUGHPUT * throughput
        and row["ttft_p95_ms"] <= MAX_TTFT * ttft
    ]
    # None fulfils both: who computes fastest is then the least bad.
    return min(allowed or tried, key=lambda row: float(row["itl_p99_ms"]))


def faults(chosen: list[dict[str, Any]]) -> list[str]:
    """Why these rows cannot be compared; none if they can."""
    found = [f"{row['name']}: {fault}" for row in chosen
             for fault in (*row["faults"], *load_faults(row))]  # fmt: skip
    if len({tuple(row["tokens"]) for row in chosen}) != 1:
        found.append(f"the modes made different numbers of tokens: {[r['tokens'] for r in chosen]}")
    return found


def ratios(chosen: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the other modes to the first, which has no transfers."""
    base, *others = chosen
    keys = ("itl_p99_ms", "chat_itl_p99_ms", "throughput_tokens_per_s", "ttft_p95_ms", "busy_s")
    found: dict[str, Any] = {}
    for row in others:
        found[row["name"]] = {key: round(row[key] / base[key], 3) for key in keys}
        itl, tokens = (found[row["name"]][key] for key in (keys[0], keys[2]))
        found[row["name"]]["bar_met"] = itl <= BAR and tokens >= MIN_THROUGHPUT
    return found


COLUMNS = {
    "output tokens/s": ("throughput_tokens_per_s", 1),
    "ITL p50 ms": ("itl_p50_ms", 1),
    "p95": ("itl_p95_ms", 0),
    "p99": ("itl_p99_ms", 0),
    "longest": ("itl_max_ms", 0),
    "chats' p99": ("chat_itl_p99_ms", 0),
    "TTFT p50 ms": ("ttft_p50_ms", 0),
    "p95 ": ("ttft_p95_ms", 0),
    "chats' p95": ("chat_ttft_p95_ms", 0),
}


def table(sweep: list[dict[str, Any]], chosen: list[dict[str, Any]]) -> str:
    """Everything that was run; what is compared is in bold."""
    lines = []
    for row in sweep:
        name = f"**{row['name']}**" if row in chosen else row["name"]
        figures = [with_spread(row["rounds"][key], digits) for key, digits in COLUMNS.values()]
        busy = f"{row['busy_engine0']:.0%}, {row['busy_engine1']:.0%}"
        lines.append([name, str(row["prefill_chunk"]), *figures, busy])
    return markdown_table(["mode", "chunk", *COLUMNS, "engines at work"], lines)


def details(chosen: list[dict[str, Any]]) -> str:
    """Where the time goes in the modes that are compared."""
    parts: dict[str, Callable[[dict[str, Any]], str]] = {
        "engines at work, s": lambda row: f"{row['busy_s']:.1f}",
        "cores: engines": lambda row: f"{row['cores_engine0']:.2f}, {row['cores_engine1']:.2f}",
        "cores: processor, frontend, router, client": lambda row: ", ".join(
            f"{row[f'cores_{name}']:.2f}" for name in ("processor", "frontend", "router", "client")
        ),
        "cores: other programs": lambda row: f"{row['cores_others']:.2f}",
        "in flight, 1st and 2nd half": lambda row: (
            f"{row['in_flight_first_half']:.1f}, {row['in_flight_second_half']:.1f}"
        ),
        "moved, MB": lambda row: f"{row['moved_bytes'] / 1e6:.1f} ({row['transfers']:.0f} times)",
        "transfer GB/s": lambda row: f"{row['transfer_gb_per_s']:.2f}",
        "copied out and in, ms": lambda row: (
            f"{row['export_kv_s'] * 1e3:.0f}, {row['import_kv_s'] * 1e3:.0f}"
        ),
        "a step, ms": lambda row: (
            f"{row['step_ms']:.1f} + {row['step_decode_ms']:.1f} a decoding request "
            f"+ {row['step_prompt_token_ms']:.2f} a prompt token"
        ),
        "tokens an event": lambda row: f"{row['tokens_per_event']:.3f}",
        "longest 1% of gaps": lambda row: ", ".join(
            f"{cause} {share:.0%}" for cause, share in row["itl_p99_from"].items() if share
        ),
        "ITL p99 in the engines, ms": lambda row: f"{row['engine_itl_p99_ms']:.0f}",
        "decode step beside a busy engine": lambda row: ", ".join(
            f"x {row[key]:.2f}" if row[key] else "-"
            for key in ("slowdown_engine0", "slowdown_engine1")
        ),
        "second token waits, ms": lambda row: ", ".join(
            f"{part} {row['handover_ms'][part]:.1f}" for part in PARTS if row["handover_ms"]
        ),
    }
    lines = [[name, *(text(row) for row in chosen)] for name, text in parts.items()]
    return markdown_table(["", *(row["name"] for row in chosen)], lines)


def _factor(text: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 0 < factor < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return factor


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the ITLs and TTFTs")
    parser.add_argument("--simulated", action="store_true", help="engines like large GPUs")
    parser.add_argument("--load", type=_factor, default=1.0, metavar="FACTOR",
                        help="so many times as many requests (%(default)s)")  # fmt: skip
    parser.add_argument("--chats", type=_factor, default=1.0, metavar="FACTOR",
                        help="so many times as many of them are chats (%(default)s)")  # fmt: skip
    args = parser.parse_args()
    seeds = [1] if args.quick else [1, 2, 3]
    engines = SIMULATED if args.simulated else REAL
    chat = dataclasses.replace(engines.chat, per_s=engines.chat.per_s * args.chats)
    engines = dataclasses.replace(engines, chat=chat)
    seconds = QUICK_SECONDS if args.quick else engines.seconds
    todo = modes(engines, args.quick)
    sweep = rows(asyncio.run(measure(engines, seeds, seconds, args.load, todo)))
    chosen = [best(sweep, name) for name in NAMES]
    print(table(sweep, chosen))
    print()
    print(details(chosen))
    wrong = faults(chosen)
    compared = None if wrong else ratios(chosen)
    for fault in wrong:
        print(f"no comparison: {fault}", file=sys.stderr)
    for name, ratio in (compared or {}).items():
        print(f"\n{name} to {AGGREGATED}: "
              + ", ".join(f"{key} {value}" for key, value in ratio.items()))  # fmt: skip
    if args.plot is not None:
        plot(sweep, chosen, args.plot)
    document = {
        "engines": dataclasses.asdict(engines) | {"seconds": seconds},
        "load": args.load,
        "remote_prefill_tokens": DEFAULT_MIN_TOKENS,
        "modes": chosen,
        "sweep": sweep,
        "ratios": compared,
        "faults": wrong,
    }
    write_result(args.json, document, engines.kind, seeds)
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
