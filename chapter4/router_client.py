"""The processor's questions to the router."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, TypeVar

from common.dispatch import dispatch
from common.protocol import ErrorInfo, PipelineError, from_wire, hop_error, to_wire
from common.protocol_router import WorkerState
from common.protocol_routing import RouteOutput, RouteRequest
from common.telemetry import request_log

from dynamo.runtime import Client, Context

T = TypeVar("T")

ROUTER_ANSWER_S = 3.0  # the router itself waits up to 2 s for an engine
# So many times as long for the last one: nobody else is left to ask, and a router on a machine
# that is short of CPU does not hang.
LAST_ROUTER_TIMES = 3
AVOID_S = 10.0  # who did not answer is asked last for so long

_turn = itertools.count()
_avoid_until: dict[int, float] = {}  # by instance id, which all endpoints of a router share


class NoRouterError(PipelineError):
    """No router is up, or the one that was asked is out of reach; kind `unavailable`."""


async def find_worker(router: Client, request: RouteRequest, context: Context) -> RouteOutput:
    """The router's choice.

    Raises:
        NoRouterError: there is no answer.
        PipelineError: the router's answer is an error: kind `unavailable`, there is no engine.
    """
    outputs = await ask_router(router, to_wire(request), RouteOutput, context)
    if not outputs:
        raise NoRouterError("unavailable", "The router gave no answer.")
    if outputs[-1].error is not None:
        raise PipelineError.of(outputs[-1].error)
    return outputs[-1]


async def is_silent(router_state: Client, instance: int) -> bool:
    """Whether the router hears nothing of an engine; no, if there is no telling."""
    try:
        states = await ask_router(router_state, {}, WorkerState, Context())
    except PipelineError:
        return False
    return any(s.instance_id == instance and s.state == "silent" for s in states)


async def ask_router(client: Client, request: Any, answer: type[T], context: Context) -> list[T]:
    """The items that a router answers with; if one gives no answer, another one is asked.

    Raises:
        NoRouterError: no router is up, or none answered in time.
        PipelineError: the router failed.
    """
    failure: PipelineError = NoRouterError(
        "unavailable", "No router is up; start one, or the processor with --router-fallback."
    )
    routers = in_turn(client.instance_ids(), time.monotonic())
    for instance in routers:
        answer_s = ROUTER_ANSWER_S * (LAST_ROUTER_TIMES if instance == routers[-1] else 1)
        try:
            # The time is for each item: a request that waits in the router is told so.
            items = await _items(_stream(client, instance, request, context), answer, answer_s)
            _avoid_until.pop(instance, None)
            return items
        except TimeoutError:
            _avoid_until[instance] = time.monotonic() + AVOID_S
            message = f"The router did not answer within {answer_s:.0f} s."
            failure = NoRouterError("unavailable", message)
        except Exception as error:
            info = hop_error(error, "router")
            if info.kind != "unavailable" or context.is_stopped():
                raise router_error(info) from error
            failure = NoRouterError.of(info)
        if context.is_stopped():
            break
        request_log(context.id()).warning("asking another router, if there is one: %s", failure)
    raise failure


def in_turn(instances: Sequence[int], now: float) -> list[int]:
    """The routers in the order in which to ask them: who hung a moment ago comes last."""
    ids = sorted(instances)
    start = next(_turn) % max(len(ids), 1)
    ids = ids[start:] + ids[:start]
    due = {instance for instance, until in _avoid_until.items() if until <= now}
    for instance in due:
        if instance in ids:
            _avoid_until[instance] = now + AVOID_S  # this one request shows how it is
        else:
            del _avoid_until[instance]
    return sorted(ids, key=lambda instance: (instance not in due, instance in _avoid_until))


async def _stream(
    client: Client, instance: int, request: Any, context: Context
) -> AsyncIterator[Any]:
    if len(client.instance_ids()) > 1:
        async for item in await client.direct(request, instance, annotated=False, context=context):
            yield item
        return
    # An only router may be about to be replaced by another one.
    async for item in dispatch(
        lambda: client.round_robin(request, annotated=False, context=context), context
    ):
        yield item


async def _items(stream: AsyncIterator[Any], answer: type[T], answer_s: float) -> list[T]:
    items: list[T] = []
    while True:
        async with asyncio.timeout(answer_s):
            item = await anext(stream, None)
        if item is None:
            return items
        items.append(from_wire(item, answer))


def router_error(info: ErrorInfo) -> PipelineError:
    return NoRouterError.of(info) if info.kind == "unavailable" else PipelineError.of(info)
