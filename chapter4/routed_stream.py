"""The processor's way to an engine: the router chooses, the processor streams from the choice.

An engine that fails is replaced by another one: as long as nothing has come of it with the same
request, and after that with one that goes on where the answer broke off.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from functools import partial
from typing import Any

from chapter4.agent_hints import retain_s
from chapter4.disaggregation import prefill_id
from chapter4.hops import Hops
from chapter4.migration import Progress, broken_off, failure_in, is_gone, is_refusal, verdict
from chapter4.reports import Attempt
from chapter4.router_client import NoRouterError, find_worker, is_silent
from chapter4.silence import ENDED_EARLY, Silence, SilentEngineError
from common.dispatch import DIED, dispatch
from common.protocol import EngineOutput, PipelineError, from_wire, hop_error, to_wire
from common.protocol_routing import (
    PrefillChoice,
    ReportKind,
    RoutedProcessRequest,
    RouteOutput,
    RouteRequest,
)
from common.protocol_transfer import KvDescriptor
from common.telemetry import request_log

from dynamo.runtime import Context
from msgspec.structs import replace


async def routed_stream(
    hops: Hops,
    request: RoutedProcessRequest,
    progress: Progress,
    started: float,
    context: Context,
) -> AsyncGenerator[EngineOutput, None]:
    """The stream of the engine that the router chooses; another choice if that one fails.

    `started` is the `time.perf_counter()` at which the processor got the request.

    Raises:
        PipelineError: the router gave no answer, or an error, or the engine's own.
        Exception: what the runtime raised, see `protocol.hop_error`.
    """
    route = _Route(hops, request, progress, started, context)
    kind: ReportKind = "failed"
    try:
        while True:
            failure: Exception | None = None
            begun = False
            try:
                streams = dispatch(route.send, context, route.choose)
                async for item in route.silence.watched(streams):
                    begun = True
                    output = from_wire(item, EngineOutput)
                    failure = failure_in(output, stopped=context.is_stopped()) or failure
                    if route.attempt is not None:
                        route.attempt.tokens(len(output.token_ids))
                    progress.add(output, time.perf_counter())
                    if output.token_ids or output.finish_reason is not None:
                        yield output
                if failure is None and not progress.finished:
                    failure = PipelineError("unavailable", ENDED_EARLY)
            except PipelineError:
                raise
            except Exception as error:  # the runtime raises nothing more precise
                silent = isinstance(error, SilentEngineError)
                if progress.finished or not (begun or silent):
                    raise  # nothing has come from any engine: `dispatch` has tried what may help
                failure = error
            if failure is None or context.is_stopped():
                kind = "finished"
                return
            if (last := progress.last_item(time.perf_counter())) is not None:
                yield last
                return
            route.lose(failure)
    finally:
        route.end(kind)


class _Route:
    """Which engine has the request, and which have had it."""

    def __init__(
        self,
        hops: Hops,
        request: RoutedProcessRequest,
        progress: Progress,
        started: float,
        context: Context,
    ) -> None:
        self.attempt: Attempt | None = None
        self._decoding: Attempt | None = None  # that begins when another engine is done
        hangs = partial(is_silent, hops.router_state)
        self._new_silence = partial(Silence, hops.engine.instance_ids, hangs)
        self.silence = self._new_silence()
        self._hops = hops
        self._request = request
        self._progress = progress
        self._started = started
        self._context = context
        self._log = request_log(context.id())
        self._tried: list[int] = []
        self._chosen: RouteOutput | None = None  # None: engines take turns
        self._failure: Exception | None = None  # for which another engine goes on
        self._sent_with = 0  # so many tokens of the answer

    async def send(self) -> AsyncIterator[Any]:
        self._progress.sent(time.perf_counter())
        if self._chosen is not None and self._chosen.prefill is not None:
            return self._by_way_of(self._chosen.prefill)
        return await self._send_on(None)

    async def _send_on(self, kv: KvDescriptor | None) -> AsyncIterator[Any]:
        """To the engine that generates; with `kv` it need not compute the prompt."""
        engine = self._hops.engine
        request = self._progress.request()
        generate = to_wire(replace(request, kv=kv, retain_s=retain_s(self._request.hints)))
        self._sent_with = len(self._progress.tokens)
        self.silence.expect(None if self._chosen is None else self._chosen.instance_id)
        if self._chosen is None:
            return await engine.round_robin(generate, annotated=False, context=self._context)
        instance = self._chosen.instance_id
        return await engine.direct(generate, instance, annotated=False, context=self._context)

    async def _by_way_of(self, prefill: PrefillChoice) -> AsyncGenerator[Any, None]:
        """The stream of the engine that generates, once another one has computed the prompt."""
        attempt = Attempt(self._hops.reporter, prefill.request_id, prefill.instance_id)
        self._decoding, self.attempt = self.attempt, None
        kind: ReportKind = "finished"  # as far as the engine is to blame
        kv: KvDescriptor | None = None
        computed: EngineOutput | None = None
        try:
            computed = await self._hops.prefill.compute(
                self._progress.request(), prefill.instance_id, self._new_silence(), self._context
            )
            attempt.tokens(len(computed.token_ids) or 1)  # some leave the first to the other engine
        except Exception as error:
            # A request that kills engines is not to have one of each role.
            killed = DIED in str(error) and not self._progress.die()
            if killed or self._context.is_stopped():
                raise
            kind = "failed" if is_gone(error) else "finished"
            self._log.warning("worker %d did not compute the prompt: %s", prefill.worker_id, error)
        finally:
            attempt.end(kind)
        if computed is not None:
            kv, computed.kv = computed.kv, None
            yield to_wire(computed)
            if computed.finish_reason is not None:
                return
        self.attempt, self._decoding = self._decoding, None
        if self.attempt is not None:
            self.attempt.sent()
        async for item in await self._send_on(kv):
            yield item

    def lose(self, failure: Exception) -> None:
        """Have another engine go on; raises the failure if that is not to be."""
        in_band = isinstance(failure, PipelineError)
        info = failure.info if isinstance(failure, PipelineError) else hop_error(failure, "engine")
        # Each engine is asked once; without a router there is no telling which one it was.
        asked_in_vain = self._chosen is not None and self._sent_with == len(self._progress.tokens)
        refused = asked_in_vain and is_refusal(failure)
        died = not refused and (not in_band or info.kind == "internal")
        if not self._progress.lose(info, time.perf_counter(), died=died, refused=refused):
            self.end(verdict(failure))
            raise failure
        self._failure = failure

    async def choose(self, failure: Exception | None) -> None:
        """Ask the router for an engine; `failure` is that of the one before."""
        if failure is not None and DIED in str(failure):
            if self._progress.tokens:
                self.lose(failure)
            elif not self._progress.die():
                raise failure
        lost, self._failure = self._failure, None
        failure, before = failure or lost, self._chosen
        self.silence.expect(None)
        self.end(verdict(failure))
        try:
            gone = before is not None and failure is not None and is_gone(failure)
            self._chosen = await self._find([before.instance_id] if before and gone else [])
        except NoRouterError as error:
            if not self._hops.fallback or self._context.is_stopped():
                raise self._broken_off(error) from error
            self._log.warning("round robin instead: %s", error)
            self._chosen = None
        except PipelineError as error:
            raise self._broken_off(error) from error
        else:
            self._log.info("worker %d: %s", self._chosen.worker_id, self._chosen.reason)
        if lost is not None:
            made = len(self._progress.tokens)
            last = self._progress.worker_id if before is None else before.worker_id
            target = "the next in turn" if self._chosen is None else self._chosen.worker_id
            self._log.warning(
                "migrating from worker %s to %s after %d tokens: %s", last, target, made, lost
            )

    def end(self, kind: ReportKind) -> None:
        """Report what became of the attempt, if there is one."""
        for attempt in (self.attempt, self._decoding):
            if attempt is not None:
                attempt.end(kind)
        self.attempt = self._decoding = None

    async def _find(self, failed: list[int]) -> RouteOutput:
        """The router's choice among the engines that our client lists."""
        hints, made = self._request.hints, len(self._progress.tokens)
        if made and hints.output_tokens is not None:
            hints = replace(hints, output_tokens=max(hints.output_tokens - made, 1))
        while True:
            wanted = RouteRequest(
                self._progress.request().token_ids,
                self._hops.model,
                failed=failed,
                excluded=self._tried,
                request_id=f"{self._context.id()}/{len(self._tried)}",
                hints=hints,
                max_tokens=self._request.sampling.max_tokens and self._progress.tokens_left(),
                waited_ms=(time.perf_counter() - self._started) * 1e3,
                admitted=made > 0 or bool(self._tried),
            )
            try:
                found = await find_worker(self._hops.router, wanted, self._context)
            except (NoRouterError, asyncio.CancelledError):
                for name in (prefill_id(wanted.request_id), wanted.request_id):
                    self._hops.reporter.never_sent(name)  # it may have chosen all the same
                raise
            self.attempt = Attempt(self._hops.reporter, wanted.request_id, found.instance_id)
            self._tried.append(found.instance_id)
            if found.instance_id in self._hops.engine.instance_ids():
                return found
            self.end("failed")  # it has left, or joined, this very moment
            if found.prefill is not None:
                self._hops.reporter.never_sent(found.prefill.request_id)
            failed = []

    def _broken_off(self, error: PipelineError) -> PipelineError:
        stopped = self._context.is_stopped()
        return error if stopped else broken_off(error, len(self._progress.tokens))
