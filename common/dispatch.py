"""A request to an endpoint with several instances survives one that is gone."""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

from common.telemetry import request_log

from dynamo.runtime import Context

# Nothing has seen the request, so another refusal costs little. The bound is for a fault that
# looks like this and never ends; more instances than that do not die at once.
MAX_REFUSALS = 64
# A dead instance refuses at once. Slower is one that died with the request in its socket, or
# NATS being away, which another instance does not help.
FAST_FAILURE_S = 2.0
# It had the request and is gone.
DIED = "Stream ended"
# The runtime does not list it: it is not there yet or not any more, or failed a moment ago.
NOT_LISTED = "not found for endpoint"
# Nobody listens there; it left before the request went out, or before the stream began; it is
# not listed.
REFUSALS = (
    "NATS request",
    "before request could be sent",
    "before response stream",
    NOT_LISTED,
)


async def dispatch(
    call: Callable[[], Awaitable[AsyncIterator[Any]]],
    context: Context,
    choose: Callable[[Exception | None], Awaitable[None]] | None = None,
) -> AsyncGenerator[Any, None]:
    """The items of the stream that `call` opens; opens it anew if an instance fails early.

    An instance stays listed for a lease's length after its death. Until the first item nobody
    has seen anything of it, so the request may go to another one: the runtime sends nothing to
    an instance that failed for the next five seconds. As long as instances refuse it at once,
    the next one is tried. That an instance dies while it works on a request, the request
    survives once only, in case it is the request that kills; and once only that nobody takes it
    within the runtime's ten seconds.

    `choose` is awaited before each call, with the failure of the one before if there was one;
    the time it takes is not the instance's.

    Raises:
        Exception: what the runtime raised, see `protocol.hop_error`, or `choose`.
    """
    died_before = slow_before = False
    refusals = 0
    failure: Exception | None = None
    while True:
        if choose is not None:
            await choose(failure)
        began = time.monotonic()
        item_seen = False
        try:
            async for item in await call():
                item_seen = True
                yield item
        except Exception as error:
            text = str(error)
            died = DIED in text
            refused = any(part in text for part in REFUSALS)
            again = text.startswith("Unavailable") and (died or refused)
            if not again or item_seen or context.is_stopped():
                raise
            slow = refused and time.monotonic() - began > FAST_FAILURE_S
            refusals += refused
            if (died and died_before) or (slow and slow_before) or refusals == MAX_REFUSALS:
                raise
            died_before |= died
            slow_before |= slow
            request_log(context.id()).warning("trying another instance: %s", error)
            failure = error
        else:
            return
