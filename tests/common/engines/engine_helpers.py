"""What the tests of all engines share."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from common.engines.base import Engine
from common.kv import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent
from common.protocol import (
    EngineOutput,
    FinishReason,
    GenerateRequest,
    SamplingParams,
    TokenLogprobs,
)

# For engines on llama.cpp: with more, the arithmetic is the same, but slower on busy machines.
ONE_THREAD: dict[str, Any] = {"threads": 1, "batch_threads": 1}


class FakeContext:
    """The part of the runtime's `Context` that engines use, stopped by hand."""

    def __init__(self) -> None:
        self._stop = asyncio.Event()

    def stop(self) -> None:
        self._stop.set()

    def id(self) -> str | None:
        return "test"

    def is_stopped(self) -> bool:
        return self._stop.is_set()

    async def async_killed_or_stopped(self) -> bool:
        return await self._stop.wait()


@dataclass
class Result:
    items: list[EngineOutput] = field(default_factory=list)

    @property
    def token_ids(self) -> list[int]:
        return [token for item in self.items for token in item.token_ids]

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        return [entry for item in self.items for entry in item.logprobs or []]

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.items[-1].finish_reason


async def collect(engine: Engine, token_ids: list[int], **sampling: Any) -> Result:
    """The whole answer to one request."""
    request = GenerateRequest(token_ids, SamplingParams(**sampling))
    return Result([item async for item in engine.generate(request, FakeContext())])


def replay(events: Iterable[KvEvent]) -> set[int]:
    """The block hashes that are cached according to the events; checks that they make sense."""
    cached: set[int] = set()
    for event in events:
        match event:
            case BlockStored(hashes, parent, token_ids, block_size):
                assert parent is None or parent in cached
                assert not cached & set(hashes)
                assert len(token_ids) == block_size * len(hashes)
                cached.update(hashes)
            case BlockRemoved(hashes):
                assert cached >= set(hashes)
                cached.difference_update(hashes)
            case AllBlocksCleared():
                cached.clear()
    return cached
