"""The processor's way to an engine: the router chooses, the processor streams from the choice."""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from dataclasses import dataclass
from typing import Any

from chapter3.reports import Attempt, Reporter
from chapter3.router_client import NoRouterError, find_worker
from common.dispatch import NOT_LISTED, dispatch
from common.protocol import EngineOutput, GenerateRequest, from_wire, to_wire
from common.protocol_routing import ReportKind, RoutedProcessRequest, RouteRequest
from common.telemetry import request_log

from dynamo.runtime import Client, Context


@dataclass(frozen=True)
class Hops:
    """What lies behind the processor; with `fallback`, engines take turns if no router is up."""

    model: str
    engine: Client
    router: Client
    reporter: Reporter
    fallback: bool


async def routed_stream(
    hops: Hops,
    request: RoutedProcessRequest,
    prompt: list[int],
    started: float,
    context: Context,
) -> AsyncGenerator[EngineOutput, None]:
    """The stream of the engine that the router chooses; another choice if that one fails.

    `started` is the `time.perf_counter()` at which the processor got the request.

    Raises:
        PipelineError: the router gave no answer, or an error.
        Exception: what the runtime raised, see `protocol.hop_error`.
    """
    generate = to_wire(GenerateRequest(prompt, request.sampling))
    log = request_log(context.id())
    tried: list[int] = []
    attempt: Attempt | None = None
    chosen: int | None = None

    async def choose(failure: Exception | None) -> None:
        nonlocal attempt, chosen
        if attempt is not None:
            attempt.end("failed")
        # One that our client does not list, or not yet, may be as good as ever.
        listed = failure is not None and NOT_LISTED not in str(failure)
        failed = [chosen] if chosen is not None and listed else []
        attempt, chosen = None, None
        try:
            while True:
                wanted = RouteRequest(
                    prompt,
                    hops.model,
                    failed=failed,
                    excluded=tried,
                    request_id=f"{context.id()}/{len(tried)}",
                    hints=request.hints,
                    max_tokens=request.sampling.max_tokens,
                    waited_ms=(time.perf_counter() - started) * 1e3,
                )
                found = await find_worker(hops.router, wanted, context)
                attempt = Attempt(hops.reporter, wanted.request_id, found.instance_id)
                tried.append(found.instance_id)
                if found.instance_id in hops.engine.instance_ids():
                    break  # else it has left, or joined, this very moment
                attempt.end("failed")
                failed = []
        except NoRouterError as error:
            if not hops.fallback or context.is_stopped():
                raise
            log.warning("round robin instead: %s", error)
            return
        chosen = found.instance_id
        log.info("worker %d: %s", found.worker_id, found.reason)

    def send() -> Awaitable[AsyncIterator[Any]]:
        if chosen is None:
            return hops.engine.round_robin(generate, annotated=False, context=context)
        return hops.engine.direct(generate, chosen, annotated=False, context=context)

    kind: ReportKind = "failed"
    try:
        async for item in dispatch(send, context, choose):
            output = from_wire(item, EngineOutput)
            if attempt is not None:
                attempt.tokens(len(output.token_ids))
            yield output
        kind = "finished"
    finally:
        if attempt is not None:
            attempt.end(kind)
