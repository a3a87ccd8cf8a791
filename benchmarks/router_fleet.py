"""Engines that exist on paper: the events and the load they would send, and a router fed them."""

import random
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.report import GuardError
from chapter2.selector import Selector
from chapter2.workers import Worker
from common.kv import BlockRemoved, BlockStored, KvEventBatch, block_hashes
from common.protocol import EngineInfo, EngineMetrics
from common.protocol_router import KvSource

import msgspec
import psutil

MODEL = "a-model"
BLOCK_SIZE = 16
PROMPT_TOKENS = 1024
PREFIX_BLOCKS = 32  # of a system prompt; the rest of a cached sequence is its own
OWN_BLOCKS = PROMPT_TOKENS // BLOCK_SIZE - PREFIX_BLOCKS
SYSTEM_PROMPTS = 16
SAMPLE = 1000

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(KvEventBatch).decode


@dataclass(frozen=True)
class Cached:
    """The last blocks of a sequence that an engine has cached, and the tokens of all of it."""

    instance: int
    token_ids: list[int]
    block_hashes: list[int]


class Fleet:
    """Engines 1 to `workers` with `blocks` blocks in total, each counting its own.

    `messages` are the event batches they would send, by engine; `sample` has some of what
    is in them, evenly.
    """

    def __init__(self, workers: int, blocks: int, seed: int = 0) -> None:
        self.instances = range(1, workers + 1)
        self.blocks = blocks
        self.blocks_each = -(-blocks // workers)  # or one less
        self.sample: list[Cached] = []
        rng = random.Random(seed)
        prefixes = [new_tokens(rng, PREFIX_BLOCKS) for _ in range(SYSTEM_PROMPTS)]
        every = max(blocks // (OWN_BLOCKS * SAMPLE), 1)
        self.messages: list[tuple[int, bytes]] = []
        for instance in self.instances:
            share = (blocks + workers - instance) // workers
            for number, (tokens, event) in enumerate(_sequences(rng, prefixes, share)):
                self.messages.append((instance, _encode(KvEventBatch(0.0, [event]))))
                if number % every == 0:
                    self.sample.append(Cached(instance, tokens, event.block_hashes))

    def prompts(self, seed: str, count: int) -> Iterator[list[int]]:
        """Half of them, in no order, begin like something that is cached; the rest is new."""
        rng = random.Random(seed)
        for _ in range(count):
            known: list[int] = []
            if rng.random() < 0.5:
                cached = rng.choice(self.sample).token_ids
                known = cached[: rng.randint(1, len(cached) // BLOCK_SIZE) * BLOCK_SIZE]
            new = new_tokens(rng, PROMPT_TOKENS // BLOCK_SIZE)
            yield (known + new)[:PROMPT_TOKENS]


def new_tokens(rng: random.Random, blocks: int) -> list[int]:
    return array("H", rng.randbytes(2 * blocks * BLOCK_SIZE)).tolist()


def _sequences(
    rng: random.Random, prefixes: list[list[int]], blocks: int
) -> Iterator[tuple[list[int], BlockStored]]:
    """Fill a cache of `blocks` blocks: each sequence, and the event for its new blocks.

    A system prompt comes first without, then with what follows it.
    """
    hashes: dict[int, list[int]] = {}  # of the cached system prompts
    while blocks:
        chosen = rng.randrange(len(prefixes))
        tokens, cached = prefixes[chosen], hashes.get(chosen, [])
        if cached:
            tokens = tokens + new_tokens(rng, OWN_BLOCKS)
        tokens = tokens[: (len(cached) + blocks) * BLOCK_SIZE]
        new = block_hashes(tokens, BLOCK_SIZE)[len(cached) :]
        if not cached:
            hashes[chosen] = new
        blocks -= len(new)
        parent = cached[-1] if cached else None
        yield tokens, BlockStored(new, parent, tokens[len(cached) * BLOCK_SIZE :], BLOCK_SIZE)


def add_engines(selector: Selector, fleet: Fleet) -> Iterator[None]:
    """Make the selector know the engines; each `next` is a message of the next one's load."""
    rng = random.Random(0)
    total = 2 * max(fleet.blocks_each, 1000)
    loads: dict[int, EngineMetrics] = {}
    for instance in fleet.instances:
        info = EngineInfo(MODEL, "simulated", 8192, BLOCK_SIZE, total, instance)
        selector.workers[instance] = Worker(instance, KvSource(info, "", "", ""), synced=True)
        loads[instance] = EngineMetrics(rng.randrange(8), 0, rng.randrange(total // 2), total)

    def reports() -> Iterator[None]:
        while True:
            for instance, load in loads.items():
                selector.workers[instance].hear(load)
                yield

    return reports()


def fill(selector: Selector, fleet: Fleet) -> tuple[float, float]:
    """Apply all the events; MB that the process grows by, and seconds."""
    process = psutil.Process()
    before = process.memory_info().rss
    start = time.perf_counter()
    for instance, message in fleet.messages:
        selector.index.apply(instance, _decode(message).events)
    seconds = time.perf_counter() - start
    return (process.memory_info().rss - before) / 1e6, seconds


def evict(selector: Selector, fleet: Fleet) -> float:
    """Remove all blocks again, the last ones first; seconds."""
    seconds = 0.0
    for instance, message in reversed(fleet.messages):
        for event in _decode(message).events:
            assert isinstance(event, BlockStored)
            removed = BlockRemoved(event.block_hashes[::-1])
            message = _encode(KvEventBatch(0.0, [removed]))
            start = time.perf_counter()
            selector.index.apply(instance, _decode(message).events)
            seconds += time.perf_counter() - start
    left = sum(selector.index.block_count(instance) for instance in fleet.instances)
    if left:
        raise GuardError(f"{left} blocks are left of {fleet.blocks} after all were removed")
    return seconds
