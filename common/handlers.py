"""Handlers of requests: async generators of a request and its context, served by the runtime."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any, NoReturn

from dynamo.runtime import Context, Endpoint

LET_GO_S = 0.2

Handler = Callable[[Any, Context], AsyncGenerator[Any, None]]


class _Items:
    """The items of a handler; closes the handler's generator on the event loop when dropped.

    The runtime takes the items from a thread of its own and drops a stream that nobody reads
    any more. A generator that was begun in a thread without an event loop cannot `await` in a
    `finally` then; begun in a coroutine, it is closed by its event loop.
    """

    def __init__(self, generator: AsyncGenerator[Any, None]) -> None:
        self._generator = generator

    def __aiter__(self) -> "_Items":
        return self

    async def __anext__(self) -> Any:
        return await anext(self._generator)


def closed_on_its_loop(handler: Handler) -> Callable[[Any, Context], _Items]:
    """The handler, for the runtime to serve."""

    def start(request: Any, context: Context) -> _Items:
        return _Items(handler(request, context))

    return start


async def let_go_of_dropped_streams(endpoint: Endpoint) -> NoReturn:
    """Have handlers end whose streams nobody reads any more, even if no other request comes.

    The runtime drops such a stream on a thread of its own, without the interpreter's lock.
    PyO3 remembers that, and does it when Python next calls one of its functions.
    """
    while True:
        await asyncio.sleep(LET_GO_S)
        endpoint.connection_id()
