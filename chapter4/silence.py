"""Engines that went without a word: nobody closes the streams of a machine that lost its power.

The runtime tells at once when a process dies. A stream from a machine that is gone, or from a
process that hangs, just stops. It is given up when the engine's lease has expired as well, or when
the router hears nothing of that engine either: a process that hangs may keep its lease, but sends
no metrics.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from contextlib import aclosing
from typing import TypeVar

# An engine that drains is not listed either, and is silent while it computes a prompt.
SILENT_S = 10.0
CHECK_S = 1.0
ENDED_EARLY = "The engine ended the stream too early."

T = TypeVar("T")


class SilentEngineError(Exception):
    """The engine is not listed any more, or hangs, and sends nothing."""


class Silence:
    """Watches the streams of one request.

    `listed` gives the instances that discovery knows; `hangs` says whether an instance is silent
    towards others, too.
    """

    def __init__(
        self, listed: Callable[[], Collection[int]], hangs: Callable[[int], Awaitable[bool]]
    ) -> None:
        self._listed = listed
        self._hangs = hangs
        self._loop = asyncio.get_running_loop()
        self._engine: int | None = None
        self._heard = 0.0
        self._reader: asyncio.Task[object] | None = None
        self._given_up = ""  # why
        self.patience_s = SILENT_S

    def expect(self, engine: int | None) -> None:
        """From now on the items are this engine's; None: nobody's, or nobody's who can be named."""
        self._engine = engine
        self._heard = self._loop.time()

    async def watched(self, stream: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """The same items.

        Raises:
            SilentEngineError: the engine that is to send them is gone.
        """
        self._given_up = ""
        checking = asyncio.ensure_future(self._keep_checking())
        try:
            async with aclosing(stream):
                while True:
                    self._reader = reader = asyncio.current_task()
                    try:
                        item = await anext(stream)
                    except StopAsyncIteration:
                        return
                    except asyncio.CancelledError:
                        if not self._given_up or reader is None:
                            raise
                        reader.uncancel()
                        raise SilentEngineError(f"Unavailable: {self._given_up}") from None
                    finally:
                        self._reader = None
                    self._heard = self._loop.time()
                    yield item
        finally:
            checking.cancel()

    async def _keep_checking(self) -> None:
        while not self._given_up:
            await asyncio.sleep(CHECK_S)
            engine, heard, listed = self._engine, self._heard, self._listed()
            # With nobody listed it is discovery that is out of order.
            if engine is None or not listed or self._loop.time() - heard < self.patience_s:
                continue
            if engine in listed and not await self._hangs(engine):
                continue
            if (engine, heard) == (self._engine, self._heard) and self._reader is not None:
                why = (
                    "the router does not hear of it either"
                    if engine in listed
                    else ("its lease has expired")
                )
                self._given_up = f"it sent nothing for {self.patience_s:g} s and {why}"
                self._reader.cancel()
