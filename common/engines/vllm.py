"""vLLM as an engine: its `AsyncLLM`, token ids in and out.

vLLM computes in processes of its own. It has a tokenizer there for one thing: what a JSON schema
allows, by llguidance unless its flags name another backend; with its flag `--skip-tokenizer-init`,
requests that have one are refused.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack
from typing import Any, Self

from common.engines.base import RequestContext
from common.engines.child_guard import ChildGuard
from common.engines.engine_events import EngineEvents
from common.engines.event_translation import EventTranslation
from common.engines.scheduled_request import schedule
from common.engines.vllm_load import engine_args, load, shut_down
from common.engines.vllm_request import KV_KIND, VllmRequest
from common.engines.vllm_stats import VllmStats
from common.kv import KvEvent
from common.model_files import served_name
from common.protocol import (
    EngineInfo,
    EngineMetrics,
    EngineOutput,
    GenerateRequest,
    PipelineError,
)
from common.protocol_transfer import KvDescriptor

HEALTH_CHECK_S = 0.5

_log = logging.getLogger(__name__)


class VllmEngine:
    """An `Engine` that `start` makes; it belongs to the event loop that it was started on.

    `resources` has what is to be given back in the end: the engine's tasks, vLLM, its events.
    """

    def __init__(
        self,
        llm: Any,
        info: EngineInfo,
        stats: VllmStats,
        events: EngineEvents,
        resources: AsyncExitStack,
    ) -> None:
        self.info = info
        self.failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self._llm = llm
        self._stats = stats
        self._events = events
        self._resources = resources
        self._vocab_size: int = llm.model_config.get_vocab_size()
        self._has_transfer = llm.vllm_config.kv_transfer_config is not None
        self._open: set[VllmRequest] = set()
        self._closing = False
        for work in (events.run(), self._watch()):
            task = asyncio.create_task(work)
            task.add_done_callback(self._task_ended)
            resources.push_async_callback(_cancel, task)

    @classmethod
    async def start(cls, model: str, worker_id: int, flags: list[str]) -> Self:
        """Start vLLM with the flags of its own command line.

        Raises:
            OSError: the model cannot be found.
            ValueError: vLLM refuses a flag or cannot run the model.
        """
        name = served_name(model)
        async with AsyncExitStack() as stack:
            guard = ChildGuard("vllm")
            stack.push_async_callback(asyncio.to_thread, guard.close)
            address = f"ipc://{guard.folder}/events"
            sockets = {"endpoint": address, "replay_endpoint": f"{address}-again"}
            args = await asyncio.to_thread(engine_args, model, flags, sockets)
            stats = VllmStats()
            llm = await load(args, stats, guard)
            stack.push_async_callback(shut_down, llm)
            config = llm.vllm_config
            info = EngineInfo(
                model=name,
                backend="vllm",
                context_length=config.model_config.max_model_len,
                block_size=config.cache_config.block_size,
                total_blocks=config.cache_config.num_gpu_blocks - 1,  # it keeps one to itself
                worker_id=worker_id,
                max_running=config.scheduler_config.max_num_seqs,
            )
            events = EngineEvents(
                sockets["endpoint"],
                EventTranslation(info.block_size, has_copies=True),
                replay=sockets["replay_endpoint"],
            )
            stack.callback(events.close)
            if config.cache_config.enable_prefix_caching:
                await events.connected()
            return cls(llm, info, stats, events, stack.pop_all())

    def subscribe(self, callback: Callable[[list[KvEvent]], None]) -> None:
        self._events.subscribe(callback)

    def metrics(self) -> EngineMetrics:
        """The load; vLLM says nothing of itself while it has nothing to do."""
        running = min(self._stats.running, len(self._open))
        used = round(self._stats.cache_usage * self.info.total_blocks) if self._open else 0
        return EngineMetrics(
            running=running,
            waiting=len(self._open) - running,
            used_blocks=used,
            total_blocks=self.info.total_blocks,
            prompt_tokens=self._stats.prompt_tokens,
            cached_tokens=self._stats.cached_tokens,
            output_tokens=self._stats.output_tokens,
        )

    def generate(
        self, request: GenerateRequest, context: RequestContext
    ) -> AsyncGenerator[EngineOutput, None]:
        """See `Engine.generate`; `json_schema` excludes `min_tokens` and `ignore_eos`.

        With `generated` tokens, a `seed`, a `presence_penalty` or a `json_schema` is refused. What
        `prefill_only` hands over has no first token: vLLM makes that where the answer goes on.
        """
        self._check_open()
        scheduled = schedule(
            request,
            context,
            context_length=self.info.context_length,
            vocab_size=self._vocab_size,
            eog_ids=frozenset(),
        )
        if request.prefill_only and not self._has_transfer:
            raise PipelineError(
                "unavailable",
                "this vLLM has no way to hand KV over: start it with -- --kv-transfer-config JSON",
            )
        return self._stream(
            VllmRequest(
                self._llm,
                scheduled,
                self.info.worker_id,
                self._stats,
                self._failure,
                prefill_only=request.prefill_only,
                kv_transfer=self._kv_transfer(request.kv),
            )
        )

    async def clear_cache(self) -> None:
        """Forget all blocks; what running requests hold is computed anew."""
        self._check_open()
        reset = await self._llm.reset_prefix_cache()
        if not (reset or await self._llm.reset_prefix_cache(reset_running_requests=True)):
            raise PipelineError("unavailable", "vLLM cannot forget its blocks now")
        self._events.cleared()  # vLLM will say so after its next step only

    async def close(self) -> None:
        """Stop the engine and free its memory; running requests end as cancelled."""
        self._closing = True
        if ending := [task for request in self._open if (task := request.stop())]:
            await asyncio.wait(ending)
        await self._resources.aclose()

    async def _stream(self, request: VllmRequest) -> AsyncGenerator[EngineOutput, None]:
        self._check_open()
        self._open.add(request)
        items = request.items()
        try:
            async for item in items:
                yield item
        finally:
            await items.aclose()
            self._open.discard(request)

    def _kv_transfer(self, kv: KvDescriptor | None) -> dict[str, Any] | None:
        if kv is None:
            return None
        if kv.kind != KV_KIND or not self._has_transfer:
            _log.warning("KV of kind %s cannot be fetched here; computing the prompt", kv.kind)
            return None
        return kv.data

    def _check_open(self) -> None:
        if failure := self._failure():
            raise failure
        if self._closing:
            raise PipelineError("unavailable", "the engine is closed")

    def _failure(self) -> PipelineError | None:
        if not self.failed.done():
            return None
        return PipelineError("internal", f"the engine failed: {self.failed.result()!r}")

    async def _watch(self) -> None:
        """Raise when vLLM's process has died; vLLM tells only those who ask."""
        while not self._llm.errored:  # noqa: ASYNC110 (no event)
            await asyncio.sleep(HEALTH_CHECK_S)
        raise RuntimeError("vLLM's process has ended")

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is None or self.failed.done() or self._closing:
            return
        _log.error("the engine failed", exc_info=error)
        self.failed.set_result(error)
        for request in self._open:
            request.stop()


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])
