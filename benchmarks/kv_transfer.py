"""How fast the KV of a prompt moves from one process to another, beside copying memory.

ZMQ and NIXL move it through the engines' own lender and borrower, in two processes on this
machine: from the moment when the KV is in the lender's memory until the borrower has it and may
use it. NIXL's lender copies it first, to where it may be read; the clock covers that, the way of
the descriptor (a pipe between the processes), the transfer, and the agreement that the loan was
still valid. Every transfer ends in memory of its own.

`memcpy` copies as many bytes within one process into memory that is in use already, which is the
limit; `memcpy, new memory` into memory from the allocator, which is new for large sizes only.
`shared memory` is only the copy out of memory that another process has filled, without a word
about who may use it when.

Before each, the caches of the processor are filled with something else, as by an engine's work.
No two transfers in a row have the same bytes; whatever arrives is compared with what was lent,
and there are no figures if it differs.
"""

import os
import sys
from importlib.metadata import version
from typing import Any

from benchmarks.kv_transfer_contenders import (
    MEMCPY,
    PIECE_BYTES,
    Contenders,
    available_ways,
    contenders,
    content,
    stamp,
)
from benchmarks.report import (
    GuardError,
    argument_parser,
    markdown_table,
    median,
    percentile,
    with_spread,
    write_result,
)
from common.errors import ComponentError
from common.kv_transfer.start import WAYS

import numpy as np
import uvloop
import zmq

MIB = 2**20
CACHE_BYTES = 64 * MIB  # no less than the processor has
SIZES_MIB = (1, 4, 16, 64, 256)


async def measure(
    moving: Contenders, size: int, rounds: int, repeats: int
) -> dict[str, list[list[float]]]:
    """Seconds of each transfer by contender and round; one more round goes before, to warm up.

    Raises:
        GuardError: something else arrived than was lent.
    """
    seconds: dict[str, list[list[float]]] = {who: [] for who in moving.by_name}
    expected, work = content(size), np.zeros(CACHE_BYTES, np.uint8)
    number = 0
    for turn in range(rounds + 1):
        for who, copy in list(moving.by_name.items())[:: -1 if turn % 2 else 1]:
            times = []
            for _ in range(repeats if turn else 2):
                number += 1
                work += 1
                taken, got = await copy(size, number)
                stamp(expected, number)
                if not np.array_equal(got, expected):
                    raise GuardError(f"{who}: what came of {size} bytes is not what was lent")
                times.append(taken)
            if turn:
                seconds[who].append(times)
    return seconds


def row(
    who: str, size: int, rounds: list[list[float]], memcpy: list[list[float]]
) -> dict[str, Any]:
    gb_per_s = [size / median(times) / 1e9 for times in rounds]
    limit = median([size / median(times) / 1e9 for times in memcpy])
    latencies = {
        "p50_ms": [round(median(times) * 1e3, 3) for times in rounds],
        "p95_ms": [round(percentile(times, 0.95) * 1e3, 3) for times in rounds],
    }
    return {
        "name": f"{size / MIB:g} MiB, {who}",
        "who": who,
        "bytes": size,
        "gb_per_s": round(median(gb_per_s), 3),
        "of_memcpy": round(median(gb_per_s) / limit, 3),
        **{key: median(values) for key, values in latencies.items()},
        "rounds": {"gb_per_s": [round(value, 3) for value in gb_per_s], **latencies},
    }


def tables(rows: list[dict[str, Any]]) -> str:
    """Speed by size, and how long the KV of a single block takes."""
    large = [entry for entry in rows if entry["bytes"] >= MIB]
    small = [entry for entry in rows if entry["bytes"] < MIB]
    speed = [
        [
            f"{entry['bytes'] / MIB:g}",
            entry["who"],
            with_spread(entry["rounds"]["gb_per_s"], 2),
            f"{entry['of_memcpy']:.2f}",
            f"{entry['p50_ms']:.1f}",
        ]
        for entry in large
    ]
    latency = [
        [
            entry["who"],
            with_spread(entry["rounds"]["p50_ms"], 2),
            with_spread(entry["rounds"]["p95_ms"], 2),
        ]
        for entry in small
    ]
    block = [f"one block, {PIECE_BYTES / MIB:.2f} MiB", "p50 ms", "p95 ms"]
    return "\n\n".join(
        [
            markdown_table(["MiB", "", "GB/s", "of memcpy", "ms"], speed),
            markdown_table(block, latency),
        ]
    )


async def run(rounds: int, scale: int) -> list[dict[str, Any]]:
    rows = []
    async with contenders() as moving:
        for size in (PIECE_BYTES, *(mib * MIB for mib in SIZES_MIB)):
            repeats = max(3, min(50, 256 * MIB // size) // scale)
            seconds = await measure(moving, size, rounds, repeats)
            rows += [row(who, size, times, seconds[MEMCPY]) for who, times in seconds.items()]
            print(f"{size / MIB:.2f} MiB: done", file=sys.stderr)
    return rows


def libraries() -> dict[str, str]:
    """Versions, and what the environment tells UCX, on which NIXL moves it."""
    found = {"ZMQ": zmq.zmq_version()}
    if "nixl" in available_ways():
        found["NIXL"] = version("nixl")
    return found | {name: value for name, value in os.environ.items() if name.startswith("UCX_")}


def main() -> None:
    args = argument_parser(__doc__).parse_args()
    rounds = 3 if args.quick else 5
    try:
        rows = uvloop.run(run(rounds, scale=5 if args.quick else 1))
    except (ComponentError, GuardError) as error:
        raise SystemExit(f"error: {error}") from error
    print(tables(rows))
    left_out = sorted(set(WAYS) - set(available_ways()))
    for way in left_out:
        print(f"\nLeft out: {way}, which is not installed here")
    used = libraries()
    print(f"\n{', '.join(f'{name} {value}' for name, value in used.items())}")
    result = {"rows": rows, "left_out": left_out, "libraries": used}
    write_result(args.json, result, "measured", sorted({entry["bytes"] for entry in rows}))


if __name__ == "__main__":
    main()
