"""How fast the KV of a prompt moves from one process to another, beside copying memory.

ZMQ and NIXL move it through the engines' own lender and borrower, in two processes on this
machine: from the moment when the borrower has the descriptor until it has KV that it may use,
with the agreement that the loan was still valid. Every transfer ends in memory of its own.

`memcpy` copies as many bytes within one process into memory that is in use already, which is the
limit; `memcpy, new memory` into memory that the system has yet to give, as every transfer needs.
`shared memory` is the copy out of memory that another process has filled, without a word about
who may use it when.

Before each, the caches of the processor are filled with something else, as by an engine's work.
Whatever arrives is compared with what was lent; there are no figures if it differs.
"""

import asyncio
import importlib.util
import multiprocessing
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from typing import Any

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
from common.kv_transfer.pieces import KvPieces
from common.kv_transfer.start import WAYS, KvTransfer, Way, kv_transfer
from common.protocol_transfer import KvDescriptor

import numpy as np
import uvloop
from numpy.typing import NDArray

HOST = "127.0.0.1"
TIMEOUT_S = 120.0
MIB = 2**20
CACHE_BYTES = 64 * MIB  # no less than the processor has
SIZES_MIB = (1, 4, 16, 64, 256)
PIECE_BYTES = 16 * 23_053  # a block of 16 tokens of SmolLM2-135M, by its 23,053 bytes a token
MEMCPY, NEW_MEMORY, SHARED = "memcpy", "memcpy, new memory", "shared memory"

Copy = Callable[[int], Awaitable[tuple[float, NDArray[np.uint8]]]]  # seconds, and what came


def content(size: int) -> NDArray[np.uint8]:
    """What is lent; both processes can make it."""
    return np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)


def lend_in_process(pipe: Connection) -> None:
    """The other process: lends what it is told to, until it is told None."""
    uvloop.run(_lend(pipe))


async def _lend(pipe: Connection) -> None:
    contents: dict[int, NDArray[np.uint8]] = {}
    async with AsyncExitStack() as stack:
        transfers: dict[Way, KvTransfer] = {}
        for way in available_ways():
            transfers[way] = await stack.enter_async_context(
                kv_transfer(way, HOST, timeout_s=TIMEOUT_S)
            )
        pipe.send("ready")
        while (order := await asyncio.to_thread(pipe.recv)) is not None:
            way, size = order
            if size not in contents:
                contents.clear()
                contents[size] = content(size)
            if way == SHARED:
                memory = SharedMemory(create=True, size=size)
                np.ndarray(size, np.uint8, memory.buf)[:] = contents[size]
                pipe.send(memory.name)
                await asyncio.to_thread(pipe.recv)
                memory.close()
                memory.unlink()
                continue
            tokens = -(-size // PIECE_BYTES) * 16
            pipe.send(transfers[way].lender.lend(KvPieces(contents[size], 0, tokens, PIECE_BYTES)))


class Contenders:
    """Everything that moves bytes, by its name; see `contenders`."""

    def __init__(self, pipe: Connection, transfers: dict[Way, KvTransfer]) -> None:
        self._pipe = pipe
        self._transfers = transfers
        self._source = self._target = np.empty(0, np.uint8)
        self.by_name: dict[str, Copy] = {
            MEMCPY: self._memcpy,
            NEW_MEMORY: self._memcpy_new,
            SHARED: self._shared_memory,
            **{way: self._fetching(way) for way in transfers},
        }

    async def _memcpy(self, size: int) -> tuple[float, NDArray[np.uint8]]:
        if self._source.size != size:
            self._source, self._target = content(size), np.zeros(size, np.uint8)
        self._target[:: max(size // 64, 1)] = 0
        start = time.perf_counter()
        np.copyto(self._target, self._source)
        return time.perf_counter() - start, self._target

    async def _memcpy_new(self, size: int) -> tuple[float, NDArray[np.uint8]]:
        if self._source.size != size:
            self._source, self._target = content(size), np.zeros(size, np.uint8)
        start = time.perf_counter()
        copy = self._source.copy()
        return time.perf_counter() - start, copy

    async def _shared_memory(self, size: int) -> tuple[float, NDArray[np.uint8]]:
        memory = SharedMemory(await self._ask(SHARED, size))
        try:
            shared = np.ndarray(size, np.uint8, memory.buf)
            start = time.perf_counter()
            copy = shared.copy()
            seconds = time.perf_counter() - start
            del shared  # before its memory
        finally:
            memory.close()
            self._pipe.send("read")
        return seconds, copy

    def _fetching(self, way: Way) -> Copy:
        async def fetch(size: int) -> tuple[float, NDArray[np.uint8]]:
            descriptor: KvDescriptor = await self._ask(way, size)
            start = time.perf_counter()
            pieces = await self._transfers[way].borrower.fetch(descriptor, 0)
            return time.perf_counter() - start, pieces.buffer

        return fetch

    async def _ask(self, way: str, size: int) -> Any:
        self._pipe.send((way, size))
        return await asyncio.to_thread(self._pipe.recv)


@asynccontextmanager
async def contenders() -> AsyncIterator[Contenders]:
    """Both processes, for the length of the block."""
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    process = context.Process(target=lend_in_process, args=(other,), daemon=True)
    process.start()
    other.close()
    async with AsyncExitStack() as stack:
        try:
            await asyncio.to_thread(pipe.recv)
            transfers: dict[Way, KvTransfer] = {}
            for way in available_ways():
                transfers[way] = await stack.enter_async_context(
                    kv_transfer(way, HOST, timeout_s=TIMEOUT_S)
                )
            yield Contenders(pipe, transfers)
            pipe.send(None)
            await asyncio.to_thread(process.join)
        finally:
            process.kill()
            process.join()
            pipe.close()


def available_ways() -> list[Way]:
    return [way for way in WAYS if way == "zmq" or importlib.util.find_spec("nixl")]


async def measure(
    moving: Contenders, size: int, rounds: int, repeats: int
) -> dict[str, list[list[float]]]:
    """Seconds of each transfer by contender and round; one more round goes before, to warm up.

    Raises:
        GuardError: something else arrived than was lent.
    """
    seconds: dict[str, list[list[float]]] = {who: [] for who in moving.by_name}
    expected, work = content(size), np.zeros(CACHE_BYTES, np.uint8)
    for turn in range(rounds + 1):
        for who, copy in list(moving.by_name.items())[:: -1 if turn % 2 else 1]:
            times = []
            for _ in range(repeats if turn else 2):
                work += 1
                taken, got = await copy(size)
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


def main() -> None:
    args = argument_parser(__doc__).parse_args()
    rounds = 3 if args.quick else 5
    try:
        rows = uvloop.run(run(rounds, scale=5 if args.quick else 1))
    except ComponentError as error:
        raise SystemExit(f"error: {error}") from error
    print(tables(rows))
    left_out = sorted(set(WAYS) - set(available_ways()))
    for way in left_out:
        print(f"\nLeft out: {way}, which is not installed here")
    write_result(args.json, {"rows": rows, "left_out": left_out}, "measured", [1])


if __name__ == "__main__":
    main()
