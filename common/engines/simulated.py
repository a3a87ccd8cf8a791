"""A simulated engine: the timing of batched inference and a real block cache, but no model.

For load tests and fault studies. A step takes

    decode_base_ms + decode_ms_per_request * (requests that decode)
        + 1000 * (prompt tokens of the step) / prefill_tokens_per_s   milliseconds

and scheduling, prefix cache, KV events and metrics are those of the llama.cpp engine.
Token ids follow from the tokens before them alone, so that equal prompts give equal outputs
and an output can be continued elsewhere. At every position one token has the probability 1:
temperature, top_p, top_k, min_p, seed and the penalties have nothing to choose from.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Self

from common.engines.base import RequestContext
from common.engines.block_cache import BlockCache
from common.engines.scheduled_request import ScheduledRequest, schedule
from common.engines.scheduler import Scheduler, Work
from common.engines.simulated_kv import hand_over, receive
from common.engines.simulated_output import SimulatedOutput
from common.engines.simulated_settings import SimulatedSettings
from common.kv import KvEvent
from common.model_files import served_name
from common.protocol import (
    EngineInfo,
    EngineMetrics,
    EngineOutput,
    FinishReason,
    GenerateRequest,
    PipelineError,
)
from common.protocol_transfer import KvDescriptor

__all__ = ["SimulatedEngine", "SimulatedSettings"]

_log = logging.getLogger(__name__)
_MAX_TOKEN_ID = 2**31


class _NoMemory:
    """A memory without content."""

    def share(self, source: int, target: int, start: int, end: int) -> None:
        pass

    def remove(self, sequence: int, start: int, end: int) -> None:
        pass


class SimulatedEngine:
    """An `Engine` on the event loop that started it."""

    def __init__(self, settings: SimulatedSettings) -> None:
        self.settings = settings
        no_queue = settings.zero_delay
        max_running = settings.max_running + (settings.max_waiting if no_queue else 0)
        self.info = EngineInfo(
            model=served_name(settings.model),
            backend="simulated",
            context_length=min(settings.context_length, settings.cache_tokens),
            block_size=settings.block_size,
            total_blocks=settings.cache_tokens // settings.block_size,
            worker_id=settings.worker_id,
            simulated=True,
            max_running=max_running,
        )
        self.failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self._scheduler = Scheduler(
            BlockCache(
                _NoMemory(),
                cells=settings.cache_tokens,
                block_size=settings.block_size,
                max_sequences=settings.max_running + settings.max_waiting + self.info.total_blocks,
            ),
            max_running=max_running,
            max_waiting=0 if no_queue else settings.max_waiting,
            prefill_chunk=settings.prefill_chunk,
            import_blocks=self.info.total_blocks,  # has arrived where it belongs: no step's work
        )
        self._outputs: dict[ScheduledRequest, SimulatedOutput] = {}
        self._arrived = asyncio.Event()
        self._closed = False
        self._steps = None if settings.zero_delay else asyncio.create_task(self._run())

    @classmethod
    async def start(cls, settings: SimulatedSettings) -> Self:
        """Start the engine.

        Raises:
            FileNotFoundError: there is no such model.
            ValueError: the file is not a model.
        """
        engine = cls(settings)
        _log.warning("worker %d is SIMULATED: timing only, no model", settings.worker_id)
        return engine

    def subscribe(self, callback: Callable[[list[KvEvent]], None]) -> None:
        self._scheduler.cache.subscribe(callback)

    async def clear_cache(self) -> None:
        """Forget all blocks that no running request holds."""
        self._scheduler.cache.clear()
        self._scheduler.cache.publish()

    def metrics(self) -> EngineMetrics:
        return self._scheduler.metrics()

    def generate(
        self, request: GenerateRequest, context: RequestContext
    ) -> AsyncGenerator[EngineOutput, None]:
        """See `Engine.generate`; refuses `json_schema`, `logprobs` and `logit_bias`."""
        self._check_open()
        for name in ("json_schema", "logprobs", "logit_bias"):
            if getattr(request.sampling, name) not in (None, []):
                raise PipelineError("invalid_request", f"a simulated engine has no {name}", name)
        scheduled = schedule(
            request,
            context,
            context_length=self.info.context_length,
            vocab_size=_MAX_TOKEN_ID,
            eog_ids=frozenset(),
        )
        settings = self.settings
        output = SimulatedOutput(scheduled, settings.token_ids, settings.mean_output_tokens)
        if settings.zero_delay:
            return self._stream_at_once(scheduled, output)
        return scheduled.items(lambda: self._submit(scheduled, output, request.kv))

    async def close(self) -> None:
        """Stop the engine; running requests end as cancelled."""
        self._closed = True
        if self._steps is not None:
            self._steps.cancel()
            await asyncio.wait([self._steps])
        for scheduled in list(self._outputs):
            self._end(scheduled, "cancelled")

    def _check_open(self) -> None:
        if self.failed.done():
            raise PipelineError("internal", f"the engine failed: {self.failed.result()!r}")
        if self._closed:
            raise PipelineError("unavailable", "the engine is closed")

    async def _submit(
        self, scheduled: ScheduledRequest, output: SimulatedOutput, kv: KvDescriptor | None
    ) -> None:
        if kv is not None:
            cache, speed = self._scheduler.cache, self.settings.transfer_tokens_per_s
            await receive(scheduled, kv, cache, speed)
        self._check_open()
        self._scheduler.add(scheduled)
        self._outputs[scheduled] = output
        self._arrived.set()

    async def _stream_at_once(
        self, scheduled: ScheduledRequest, output: SimulatedOutput
    ) -> AsyncGenerator[EngineOutput, None]:
        self._check_open()
        self._scheduler.add(scheduled)
        self._compute(scheduled, len(scheduled.tokens))
        reason: FinishReason | None = None
        try:
            while reason is None:
                if self._closed or scheduled.is_stopped():
                    reason = "cancelled"
                wanted = 1 if scheduled.prefill_only else self.settings.tokens_per_item
                while reason is None and len(output.unsent) < wanted:
                    reason = output.advance(self._scheduler)
                if reason is None and scheduled.prefill_only:
                    yield hand_over(scheduled, self.info.worker_id, output.take())
                    return
                if reason is not None:
                    self._retire(scheduled)  # a reader need not come back after the last item
                yield scheduled.item(self.info.worker_id, output.take(), finish_reason=reason)
                await asyncio.sleep(0)
        finally:
            if reason is None:
                self._retire(scheduled)

    def _retire(self, scheduled: ScheduledRequest) -> None:
        self._compute(scheduled, len(scheduled.tokens) - 1)
        self._scheduler.finish(scheduled)
        self._scheduler.cache.publish()

    def _compute(self, scheduled: ScheduledRequest, end: int) -> None:
        """Have the tokens up to `end` in the cache, if there is room."""
        sequence = self._scheduler.running[scheduled]
        tokens = scheduled.tokens[len(sequence.tokens) : end]
        if self._scheduler.cache.reserve(len(tokens)):
            self._scheduler.cache.append(sequence, tokens)

    async def _run(self) -> None:
        try:
            while True:
                for scheduled in self._scheduler.drop_stopped():
                    self._end(scheduled, "cancelled")
                work = self._scheduler.plan()
                self._scheduler.cache.publish()
                if not work:
                    self._arrived.clear()
                    await self._arrived.wait()
                    continue
                await asyncio.sleep(self._step_seconds(work))
                self._scheduler.computed(work)
                for item in work:
                    if item.sample:
                        self._advance(item.request)
        except Exception as error:
            _log.exception("the simulated engine failed")
            self.failed.set_result(error)
            for scheduled in self._outputs:
                scheduled.stream.fail(PipelineError("internal", f"the engine failed: {error!r}"))

    def _step_seconds(self, work: list[Work]) -> float:
        counts = [len(item.tokens) for item in work if item.received is None]
        decodes = counts.count(1)
        prompt_tokens = sum(counts) - decodes
        settings = self.settings
        return (
            settings.decode_base_ms / 1e3
            + settings.decode_ms_per_request / 1e3 * decodes
            + prompt_tokens / settings.prefill_tokens_per_s
        )

    def _advance(self, scheduled: ScheduledRequest) -> None:
        output = self._outputs[scheduled]
        reason = output.advance(self._scheduler)
        if reason is not None:
            self._scheduler.finish(scheduled)
            self._end(scheduled, reason)
        elif scheduled.prefill_only:
            self._scheduler.finish(scheduled)
            tokens = self._outputs.pop(scheduled).take()
            scheduled.stream.put(hand_over(scheduled, self.info.worker_id, tokens))
        elif len(output.unsent) >= self.settings.tokens_per_item:
            scheduled.stream.put(scheduled.item(self.info.worker_id, output.take()))

    def _end(self, scheduled: ScheduledRequest, reason: FinishReason) -> None:
        tokens = self._outputs.pop(scheduled).take()
        scheduled.stream.put(scheduled.item(self.info.worker_id, tokens, finish_reason=reason))
