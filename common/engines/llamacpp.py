"""The default engine: llama.cpp on the CPU with continuous batching and a block prefix cache."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Self

from common.engines.base import RequestContext
from common.engines.block_cache import BlockCache
from common.engines.grammar import GrammarCompiler
from common.engines.inference_loop import Delivery, InferenceLoop
from common.engines.json_schema import check_schema_size
from common.engines.kv_handover import KvHandover
from common.engines.llama_capi import Vocab
from common.engines.llama_context import LlamaContext
from common.engines.llamacpp_load import load
from common.engines.llamacpp_settings import LlamaCppSettings
from common.engines.scheduled_request import ScheduledRequest, schedule
from common.engines.scheduler import Scheduler
from common.kv import KvEvent
from common.kv_transfer.start import KvTransfer
from common.model_files import find_model
from common.protocol import (
    EngineInfo,
    EngineMetrics,
    EngineOutput,
    FinishReason,
    GenerateRequest,
    PipelineError,
)
from common.protocol_transfer import KvDescriptor

import msgspec
from llguidance import LLMatcher

__all__ = ["LlamaCppEngine", "LlamaCppSettings"]

_log = logging.getLogger(__name__)


class LlamaCppEngine:
    """An `Engine` that `start` makes; it belongs to the event loop that it was started on."""

    info: EngineInfo
    _vocab: Vocab
    _cache: BlockCache

    def __init__(self, settings: LlamaCppSettings, transfer: KvTransfer | None = None) -> None:
        self._settings = settings
        self._handover = KvHandover(transfer, find_model(settings.model).name)
        self._event_loop = asyncio.get_running_loop()
        self.failed: asyncio.Future[BaseException] = self._event_loop.create_future()
        self._loaded: asyncio.Future[None] = self._event_loop.create_future()
        self._ended = asyncio.Event()
        self._closing = False
        self._open: set[ScheduledRequest] = set()
        self._clearing: set[asyncio.Future[None]] = set()
        self._grammars = GrammarCompiler(settings.model)
        self._inference = InferenceLoop(
            settings.worker_id,
            load=self._load,
            loaded=lambda: self._on_loop(lambda: _complete(self._loaded)),
            deliver=lambda batch: self._on_loop(lambda: self._deliver(batch)),
            ended=lambda error: self._on_loop(lambda: self._end(error)),
        )

    @classmethod
    async def start(cls, settings: LlamaCppSettings, transfer: KvTransfer | None = None) -> Self:
        """Load the model and start the engine's thread.

        With `transfer`, which stays the caller's to close, KV goes to and comes from other engines.

        Raises:
            OSError: there is no such model file.
            ValueError: the file is not a model, or a setting is out of range.
            LlamaCppError: llama.cpp cannot load or run the model.
        """
        engine = cls(settings, transfer)
        engine._inference.start()
        try:
            await engine._loaded
        except BaseException:
            await engine.close()
            raise
        return engine

    def subscribe(self, callback: Callable[[list[KvEvent]], None]) -> None:
        self._cache.subscribe(callback)

    def metrics(self) -> EngineMetrics:
        """The load; what the thread has not seen yet, or has to be compiled, counts as waiting."""
        metrics = self._inference.metrics
        waiting = max(len(self._open) - metrics.running, 0) + self._grammars.compiling
        return msgspec.structs.replace(
            metrics,
            waiting=waiting + self._handover.fetching,
            failed_transfers=self._handover.failed + self._inference.failed_imports,
            retained_blocks=self._cache.retention.blocks_now(),  # time passes without a step
        )

    def generate(
        self, request: GenerateRequest, context: RequestContext
    ) -> AsyncGenerator[EngineOutput, None]:
        """See `Engine.generate`; `json_schema` excludes `min_tokens` and `ignore_eos`."""
        self._check_open()
        sampling = request.sampling
        if sampling.json_schema is not None:
            check_schema_size(sampling.json_schema)
            for name in ("min_tokens", "ignore_eos"):
                if getattr(sampling, name):
                    message = f"{name} cannot be combined with a JSON schema"
                    raise PipelineError("invalid_request", message, name)
        scheduled = schedule(
            request,
            context,
            context_length=self.info.context_length,
            vocab_size=self._vocab.n_tokens,
            eog_ids=self._vocab.eog_ids,
        )
        self._handover.check(request)
        if request.kv is not None:
            return self._items_after(scheduled, request.kv)
        return scheduled.items(lambda: self._submit(scheduled))

    async def clear_cache(self) -> None:
        """Forget all blocks that no running request holds."""
        self._check_open()
        cleared: asyncio.Future[None] = self._event_loop.create_future()
        self._clearing.add(cleared)

        def clear() -> None:
            self._cache.clear()
            self._cache.publish()
            self._on_loop(lambda: _complete(cleared))

        self._inference.call(clear)
        try:
            await cleared
        finally:
            self._clearing.discard(cleared)

    async def close(self) -> None:
        """Stop the engine and free its memory; running requests end as cancelled."""
        self._closing = True
        self._grammars.stop()
        self._handover.close()
        self._inference.stop()
        await self._ended.wait()
        await asyncio.to_thread(self._inference.join)
        await asyncio.to_thread(self._grammars.close)

    def _check_open(self) -> None:
        if self.failed.done():
            raise _failure(self.failed.result())
        if self._closing:
            raise PipelineError("unavailable", "the engine is closed")

    async def _items_after(
        self, request: ScheduledRequest, kv: KvDescriptor
    ) -> AsyncGenerator[EngineOutput, None]:
        self._check_room()
        try:
            await self._handover.receive(request, kv, self._cache)
            async with aclosing(request.items(lambda: self._submit(request))) as items:
                async for item in items:
                    self._handover.done(request)  # it runs, so it has taken over what there was
                    yield item
        finally:
            self._handover.done(request)

    async def _submit(self, request: ScheduledRequest) -> None:
        self._check_open()
        matcher = None
        if request.sampling.json_schema is not None:
            matcher = await self._compile(request, request.sampling.json_schema)
            if matcher is None or matcher.is_stopped():
                # Stopped: the engine that was here before had finished the document.
                reason: FinishReason = "cancelled" if matcher is None else "stop"
                request.stream.put(request.item(self.info.worker_id, [], finish_reason=reason))
                return
        self._check_open()
        self._open.add(request)
        self._inference.submit(request, matcher)

    def _check_room(self) -> None:
        """What is not scheduled yet waits, too."""
        limit = self._settings.max_running + self._settings.max_waiting
        requests = len(self._open) + self._grammars.compiling + self._handover.fetching
        if requests >= limit:
            message = f"the engine is full: it has {requests} of at most {limit} requests"
            raise PipelineError("overloaded", message)

    async def _compile(self, request: ScheduledRequest, json_schema: str) -> LLMatcher | None:
        """The matcher for the request's schema; None when it is stopped before that is made."""
        self._check_room()
        stopped = request.context.async_killed_or_stopped()
        return await self._grammars.compile_unless(stopped, json_schema, request.output)

    def _load(self) -> tuple[LlamaContext, Scheduler]:
        """Runs on the engine's thread, like all that touches llama.cpp's context."""
        loaded = load(self._settings)
        self._vocab, self._cache = loaded.context.vocab, loaded.cache
        self.info = loaded.info
        return loaded.context, loaded.scheduler

    def _on_loop(self, function: Callable[[], object]) -> None:
        self._event_loop.call_soon_threadsafe(function)

    def _deliver(self, batch: list[Delivery]) -> None:
        for delivery in batch:
            request, result = delivery.request, delivery.result
            if isinstance(result, PipelineError):
                request.stream.fail(result)
                self._open.discard(request)
            else:
                if delivery.kv is not None:
                    result.kv = self._handover.lend(request, delivery.kv)
                request.stream.put(result)
                if result.finish_reason is not None or result.kv is not None:
                    self._open.discard(request)

    def _end(self, error: BaseException | None) -> None:
        """The engine's thread is over: nobody who waits for it may wait for ever."""
        self._ended.set()
        if error is not None and not self._loaded.done():
            self._loaded.set_exception(error)
        elif error is not None:
            _log.error("the engine failed", exc_info=error)
            self.failed.set_result(error)
        for request in self._open:
            if error is not None:
                request.stream.fail(_failure(error))
            else:
                request.stream.put(request.item(self.info.worker_id, [], finish_reason="cancelled"))
        self._open.clear()
        for cleared in self._clearing:
            if not cleared.done():
                cleared.set_exception(PipelineError("unavailable", "the engine is closed"))


def _failure(cause: BaseException) -> PipelineError:
    failure = PipelineError("internal", f"the engine failed: {cause!r}")
    failure.__cause__ = cause
    return failure


def _complete(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
