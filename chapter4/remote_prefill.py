"""The way to a prefill engine: it computes a prompt for the engine that will generate the rest."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from chapter4.migration import failure_in
from chapter4.silence import Silence
from common.protocol import EngineOutput, GenerateRequest, PipelineError, from_wire, to_wire
from common.streams import merge_outputs
from common.telemetry import log
from common.waiting import link

from dynamo.runtime import Client, Context
from msgspec.structs import replace

DEFAULT_PREFILL_TIMEOUT_S = 60.0
# An engine that drains is not listed any more, and keeps its stream open until its KV is fetched.
READ_ON_S = 60.0


class RemotePrefill:
    """For one processor; `close` ends what is still being read."""

    def __init__(self, engine: Client, timeout_s: float) -> None:
        self._engine = engine
        self._timeout_s = timeout_s
        self._reading: set[asyncio.Task[None]] = set()

    async def compute(
        self, request: GenerateRequest, instance: int, silence: Silence, context: Context
    ) -> EngineOutput:
        """What the prefill engine sends: the first token, if it makes it, and where the KV is.

        With a finish reason the answer is over already. `silence` is for this stream alone.

        Raises:
            Exception: it failed, or did not answer in time; see `protocol.hop_error`.
        """
        # A context of its own, so that giving up ends the engine's work, and not ours with it.
        child = context.detached(context.id())
        linked = asyncio.ensure_future(link(context, child))
        silence.expect(instance)
        items = silence.watched(self._items(request, instance, child))
        try:
            async with asyncio.timeout(self._timeout_s):
                return await _answer(items, context)
        except BaseException as error:
            child.stop_generating()
            if isinstance(error, TimeoutError):
                message = f"The prefill engine did not answer within {self._timeout_s:g} s."
                raise PipelineError("unavailable", message) from None
            raise
        finally:
            # A stream that is not read to its end looks like a broken engine; one backend keeps
            # it open until the KV has been fetched, the client has left, or the engine is silent.
            silence.patience_s = max(silence.patience_s, READ_ON_S)
            reading = asyncio.ensure_future(_read_on(items))
            self._reading.add(reading)
            reading.add_done_callback(self._reading.discard)
            reading.add_done_callback(lambda _: linked.cancel())

    async def close(self) -> None:
        for reading in self._reading:
            reading.cancel()
        await asyncio.gather(*self._reading, return_exceptions=True)

    async def _items(
        self, request: GenerateRequest, instance: int, context: Context
    ) -> AsyncGenerator[Any, None]:
        wire = to_wire(replace(request, prefill_only=True))
        stream: AsyncIterator[Any] = await self._engine.direct(
            wire, instance, annotated=False, context=context
        )
        async for item in stream:
            yield item


async def _answer(items: AsyncGenerator[Any, None], context: Context) -> EngineOutput:
    outputs: list[EngineOutput] = []
    async for item in items:
        output = from_wire(item, EngineOutput)
        failure = failure_in(output, stopped=context.is_stopped())
        if failure is not None:
            raise failure
        outputs.append(output)
        if output.kv is not None or output.finish_reason is not None:
            return merge_outputs(outputs)
    raise PipelineError("unavailable", "The prefill engine ended the stream too early.")


async def _read_on(items: AsyncGenerator[Any, None]) -> None:
    try:
        async for _ in items:
            pass
    except Exception as error:  # whoever decodes finds out whether the KV is there
        log.debug("a prefill engine, after its answer: %s", error)
