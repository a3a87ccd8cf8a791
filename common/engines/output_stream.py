"""The end of a request that its caller reads: an item has all tokens that are ready."""

import asyncio

from common.protocol import EngineOutput
from common.streams import merge_outputs


class OutputStream:
    """Belongs to one event loop; `put` and `fail` are for that loop's thread only."""

    def __init__(self) -> None:
        self._pending: EngineOutput | None = None
        self._error: BaseException | None = None
        self._ready = asyncio.Event()

    def put(self, output: EngineOutput) -> None:
        """Add an item, joined to the one that has not been read yet."""
        self._pending = merge_outputs([self._pending, output]) if self._pending else output
        self._ready.set()

    def fail(self, error: BaseException) -> None:
        """Make the next read raise, once what came before it is read."""
        self._error = error
        self._ready.set()

    async def next(self) -> EngineOutput:
        """Everything that has come since the last call; waits for something to come."""
        while self._pending is None:
            if self._error is not None:
                raise self._error
            self._ready.clear()
            await self._ready.wait()
        item, self._pending = self._pending, None
        return item
