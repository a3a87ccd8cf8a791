"""A request to an endpoint with several instances survives one that is gone."""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

from common.telemetry import request_log

from dynamo.runtime import Context

MAX_TRIES = 3
# A dead instance refuses at once. Slower is one that died with the request in its socket, or
# NATS being away, which another instance does not help.
FAST_FAILURE_S = 2.0
# Nobody listens there; it left before the stream began; discovery no longer (or not yet) lists it.
REFUSALS = ("NATS request", "before response stream", "not found for endpoint")


async def dispatch(
    call: Callable[[], Awaitable[AsyncIterator[Any]]], context: Context
) -> AsyncGenerator[Any, None]:
    """The items of the stream that `call` opens; opens it anew if an instance fails early.

    An instance stays listed for a lease's length after its death. Until the first item nobody
    has seen anything of it, so the request may go to another one: the runtime sends nothing to
    an instance that failed for the next five seconds. A request whose instance died while it
    worked on it is tried once more only, in case it is the request that kills; so is one that
    nobody took within the runtime's ten seconds.

    Raises:
        Exception: what the runtime raised, see `protocol.hop_error`.
    """
    tries_left = MAX_TRIES
    while True:
        began = time.monotonic()
        try:
            async for item in await call():
                tries_left = 0
                yield item
        except Exception as error:
            tries_left -= 1
            text = str(error)
            died = "Stream ended" in text
            refused = any(part in text for part in REFUSALS)
            again = text.startswith("Unavailable") and (died or refused)
            if not again or tries_left <= 0 or context.is_stopped():
                raise
            if died or time.monotonic() - began > FAST_FAILURE_S:
                tries_left = 1
            request_log(context.id()).warning("trying another instance: %s", error)
        else:
            return
