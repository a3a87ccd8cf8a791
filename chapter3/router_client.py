"""The processor's questions to the router."""

import asyncio
from typing import Any, TypeVar

from common.dispatch import dispatch
from common.protocol import ErrorInfo, PipelineError, from_wire, hop_error, to_wire
from common.protocol_routing import RouteOutput, RouteRequest

from dynamo.runtime import Client, Context

T = TypeVar("T")

ROUTER_ANSWER_S = 3.0  # the router itself waits up to 2 s for an engine


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
    if outputs[0].error is not None:
        raise PipelineError.of(outputs[0].error)
    return outputs[0]


async def ask_router(client: Client, request: Any, answer: type[T], context: Context) -> list[T]:
    """The items that a router answers with.

    Raises:
        NoRouterError: no router is up, or it did not answer in time.
        PipelineError: the router failed.
    """
    if not client.instance_ids():
        message = "No router is up; start one, or the processor with --router-fallback."
        raise NoRouterError("unavailable", message)
    items = dispatch(lambda: client.round_robin(request, annotated=False, context=context), context)
    try:
        async with asyncio.timeout(ROUTER_ANSWER_S):
            return [from_wire(item, answer) async for item in items]
    except TimeoutError as error:
        message = f"The router did not answer within {ROUTER_ANSWER_S:.0f} s."
        raise NoRouterError("unavailable", message) from error
    except Exception as error:
        raise router_error(hop_error(error, "router")) from error


def router_error(info: ErrorInfo) -> PipelineError:
    return NoRouterError.of(info) if info.kind == "unavailable" else PipelineError.of(info)
