"""The memory that a lender lets others read over NIXL.

It is registered once and for all: a peer keeps what it was told of a registration as long as it
knows the agent, so what is lent is copied into memory that never changes its registration.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from common.kv_transfer.nixl_agent import register
from common.kv_transfer.regions import Regions, aligned

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Stored:
    """What is lent; it is all in its place when `copied` is done."""

    place: NDArray[np.uint8]
    offset: int
    copied: asyncio.Future[None]


class LentMemory:
    """`size` bytes, which take real memory only once they were used; for one event loop."""

    def __init__(self, agent: Any, size: int) -> None:
        self._agent = agent
        self._memory = np.empty(aligned(size), np.uint8)
        self._regions = Regions(self._memory.nbytes)
        self._registration = register(agent, self._memory)
        self._copier = ThreadPoolExecutor(1, "kv-lender")
        self.metadata: bytes = agent.get_agent_metadata()

    def store(self, data: NDArray[np.uint8]) -> Stored | None:
        """Begin to copy; None if there is no room."""
        offset = self._regions.take(data.nbytes)
        if offset is None:
            return None
        place = self._memory[offset : offset + data.nbytes]
        loop = asyncio.get_running_loop()
        copied = loop.run_in_executor(self._copier, np.copyto, place, data)
        return Stored(place, offset, copied)

    def free(self, stored: Stored) -> None:
        """The memory may be used for something else; `copied` is done."""
        self._regions.give_back(stored.offset, stored.place.nbytes)

    def close(self) -> None:
        self._copier.shutdown()
        self._agent.deregister_memory(self._registration)
        self._agent = None  # it ends with its last user
