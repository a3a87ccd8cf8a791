"""How long the router takes to choose an engine, beside what Dynamo has for it.

Everything runs in one process, without the network that a request to the router crosses. The
engines exist on paper: their KV events are real, and each sends its load again in turn. Prompts
have 1024 tokens in blocks of 16; half of them begin like something that is cached.

`select` is our decision: hash the prompt, look it up, weigh every engine, count the prompt as
sent, say why. `find_worker` adds what the endpoint does: the request from and the answer to its
wire format. `find_matches` is the look-up in the tree alone, without the prompt's hashes, and so
the limit. The peers choose without counting the prompt as sent.

The second table is about following the engines: what the process grows by when all their events
are applied, and the time to decode and apply those that store a block and those that remove one.
"""

import asyncio
import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.report import (
    argument_parser,
    markdown_table,
    median,
    percentile,
    with_spread,
    write_result,
)
from benchmarks.router_contenders import Contender, check, ours, peers
from benchmarks.router_fleet import BLOCK_SIZE, PROMPT_TOKENS, Fleet, add_engines, evict, fill
from chapter2.selector import Selector
from launch.children import Children
from launch.servers import nats_server

import uvloop

WORKERS = (8, 64, 512)
BLOCKS = (10_000, 1_000_000)
TURN = 50  # decisions of one before the next one's turn


@dataclass(frozen=True)
class Memory:
    """What the index of the fleet's blocks takes, and what following its events costs."""

    name: str
    workers: int
    blocks: int
    index_mb: float
    stored_us_per_block: float
    removed_us_per_block: float


@dataclass
class Measured:
    """Of one size of fleet: seconds of each decision by contender and seed."""

    memory: Memory
    seconds: dict[str, list[list[float]]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)  # who, and why


async def measure(workers: int, blocks: int, seeds: list[int], decisions: int) -> Measured:
    """One size of fleet, in a process of its own; the first seed warms up."""
    fleet = Fleet(workers, blocks)
    selector = Selector("kv", seed=0)
    reports = add_engines(selector, fleet)
    megabytes, stored_s = fill(selector, fleet)
    seconds: dict[str, list[list[float]]] = {}
    left_out: dict[str, str] = {}
    async with AsyncExitStack() as stack:
        contenders = ours(selector) + await peers(fleet, stack, left_out)
        gc.collect()
        gc.freeze()  # as every component does when it is ready
        for seed in seeds:
            for _ in range(workers):  # the engines were silent for as long as all this took
                next(reports)
            timed = await one_round(contenders, fleet, seed, decisions, reports)
            for who, values in timed.items():
                if seed != seeds[0]:
                    seconds.setdefault(who, []).append(values)
    memory = Memory(
        f"{workers} workers, {blocks} blocks",
        workers,
        fleet.blocks,
        round(megabytes, 1),
        round(stored_s / fleet.blocks * 1e6, 2),
        round(evict(selector, fleet) / fleet.blocks * 1e6, 2),
    )
    return Measured(memory, seconds, left_out)


async def one_round(
    contenders: list[Contender],
    fleet: Fleet,
    seed: int,
    decisions: int,
    reports: Iterator[None],
) -> dict[str, list[float]]:
    """Everyone decides on prompts of their own, as the selector remembers those it has seen."""
    seconds: dict[str, list[float]] = {contender.who: [] for contender in contenders}
    outcomes: dict[str, list[tuple[set[int], int]]] = {c.who: [] for c in contenders}
    for turn in range(decisions // TURN):
        for contender in contenders[:: -1 if turn % 2 else 1]:
            for prompt in fleet.prompts(f"{seed} {turn} {contender.who}", TURN):
                argument = contender.prepare(prompt)
                start = time.perf_counter()
                outcome = await contender.decide(argument)
                seconds[contender.who].append(time.perf_counter() - start)
                outcomes[contender.who].append(contender.read(outcome))
                next(reports)
    for who in outcomes:
        check(who, fleet, outcomes[who])
    return seconds


def measure_in_process(*arguments: Any) -> Measured:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(measure(*arguments))


def row(memory: Memory, who: str, rounds: list[list[float]]) -> dict[str, Any]:
    by_round: dict[str, list[float]] = {
        "decisions_per_s": [round(len(seconds) / sum(seconds)) for seconds in rounds],
        "p50_us": [round(median(seconds) * 1e6, 1) for seconds in rounds],
        "p99_us": [round(percentile(seconds, 0.99) * 1e6, 1) for seconds in rounds],
    }
    return {
        "name": f"{memory.name}, {who}",
        "workers": memory.workers,
        "blocks": memory.blocks,
        "who": who,
        **{key: median(values) for key, values in by_round.items()},
        "rounds": by_round,
    }


def table(rows: list[dict[str, Any]]) -> str:
    header = ["workers", "blocks", "", "decisions/s", "p50 µs", "p99 µs"]
    lines = [
        [
            str(entry["workers"]),
            f"{entry['blocks']:,}",
            entry["who"],
            with_spread(entry["rounds"]["decisions_per_s"]),
            with_spread(entry["rounds"]["p50_us"]),
            with_spread(entry["rounds"]["p99_us"]),
        ]
        for entry in rows
    ]
    return markdown_table(header, lines)


def memory_table(memories: list[Memory]) -> str:
    header = ["workers", "blocks", "index MB", "stored, µs a block", "removed, µs a block"]
    lines = [
        [
            str(memory.workers),
            f"{memory.blocks:,}",
            f"{memory.index_mb:.0f}",
            f"{memory.stored_us_per_block:.1f}",
            f"{memory.removed_us_per_block:.1f}",
        ]
        for memory in memories
    ]
    return markdown_table(header, lines)


async def run(seeds: list[int], decisions: int) -> list[Measured]:
    results: list[Measured] = []
    with Children() as children:
        async with nats_server(children) as nats:
            os.environ["NATS_SERVER"] = nats.url  # KvRouter hears of events through it
            for blocks in BLOCKS:
                for workers in WORKERS:
                    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                        measured = await asyncio.get_running_loop().run_in_executor(
                            pool, measure_in_process, workers, blocks, seeds, decisions
                        )
                    results.append(measured)
                    print(f"{measured.memory.name}: done", file=sys.stderr)
    return results


def main() -> None:
    args = argument_parser(__doc__).parse_args()
    seeds = list(range(4 if args.quick else 6))
    results = asyncio.run(run(seeds, 500 if args.quick else 2000))
    rows = [
        row(measured.memory, who, rounds)
        for measured in results
        for who, rounds in measured.seconds.items()
    ]
    left_out = [
        {"name": f"{measured.memory.name}, {who}", "reason": reason}
        for measured in results
        for who, reason in measured.left_out.items()
    ]
    memories = [measured.memory for measured in results]
    print(table(rows), "", memory_table(memories), sep="\n")
    for entry in left_out:
        print(f"\nLeft out: {entry['name']}: {entry['reason']}")
    result = {
        "rows": rows,
        "memory": [asdict(memory) for memory in memories],
        "left_out": left_out,
        "prompt_tokens": PROMPT_TOKENS,
        "block_size": BLOCK_SIZE,
    }
    write_result(args.json, result, "measured", seeds[1:])


if __name__ == "__main__":
    main()
