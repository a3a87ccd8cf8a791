"""The end of a request that its caller reads: an item has all tokens that are ready."""

import asyncio

from common.protocol import EngineOutput


class OutputStream:
    """Belongs to one event loop; `put` and `fail` are for that loop's thread only."""

    def __init__(self) -> None:
        self._pending: EngineOutput | None = None
        self._error: BaseException | None = None
        self._ready = asyncio.Event()

    def put(self, output: EngineOutput) -> None:
        """Add an item, joined to the one that has not been read yet."""
        if self._pending is None:
            self._pending = output
        else:
            join(self._pending, output)
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


def join(first: EngineOutput, second: EngineOutput) -> None:
    """Append the second item of a stream to the first, in place."""
    first.token_ids.extend(second.token_ids)
    if second.logprobs is not None:
        first.logprobs = (first.logprobs or []) + second.logprobs
    if second.worker_id is not None:
        first.worker_id, first.cached_tokens = second.worker_id, second.cached_tokens
    first.finish_reason = second.finish_reason
    first.timings = second.timings
    first.error = second.error
