"""Engines as the router sees them, made by hand, and a clock that tests set."""

from chapter2.selector import Selector
from chapter2.workers import Worker
from common.kv import BlockStored, block_hashes
from common.protocol import EngineInfo, EngineMetrics
from common.protocol_router import KvSource

MODEL = "a-model"


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def source(
    worker_id: int = 0, *, model: str = MODEL, block_size: int = 4, total_blocks: int = 100
) -> KvSource:
    info = EngineInfo(model, "simulated", 1000, block_size, total_blocks, worker_id)
    return KvSource(info, f"topic-{worker_id}", "tcp://events", "tcp://metrics")


def load(
    running: int = 0, waiting: int = 0, used_blocks: int = 0, total_blocks: int = 100
) -> EngineMetrics:
    return EngineMetrics(running, waiting, used_blocks, total_blocks)


def add_engine(selector: Selector, instance: int, clock: Clock, known: KvSource) -> Worker:
    """An engine that was heard of just now, with nothing cached."""
    worker = Worker(instance, known, synced=True, heard=clock.now)
    selector.workers[instance] = worker
    return worker


def stored(tokens: list[int], block_size: int = 4) -> BlockStored:
    """The event that a whole sequence is cached."""
    hashes = block_hashes(tokens, block_size)
    return BlockStored(hashes, None, tokens[: len(hashes) * block_size], block_size)
