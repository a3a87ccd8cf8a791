"""The SGLang engine: `sglang.Engine` without a tokenizer, token ids in and out.

Its flags are SGLang's own. What it cannot do is refused by the field's name: `seed` unless it was
started with `--enable-deterministic-inference`, a JSON schema together with `min_tokens`,
`ignore_eos` or `generated`; `sglang_sampling` tells how an output is continued, and
`llguidance_schema` whose grammars it has.
"""

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Self

from common.engines.base import RequestContext
from common.engines.engine_events import EngineEvents
from common.engines.event_translation import EventTranslation
from common.engines.scheduled_request import ScheduledRequest, schedule
from common.engines.sglang_handover import bootstrap_address, check_mode, new_room, room_arguments
from common.engines.sglang_load import SGLangLoad
from common.engines.sglang_output import read_output, refusal
from common.engines.sglang_process import SGLangProcess
from common.engines.sglang_sampling import generate_arguments
from common.kv import AllBlocksCleared, KvEvent
from common.model_files import served_name
from common.protocol import (
    EngineInfo,
    EngineMetrics,
    EngineOutput,
    GenerateRequest,
    PipelineError,
)
from common.waiting import complete_with_failure

CLEARED_TIMEOUT_S = 5.0

_log = logging.getLogger(__name__)


class SGLangEngine:
    """An `Engine` that `start` makes; it belongs to the event loop that it was started on."""

    info: EngineInfo
    _process: SGLangProcess
    _events: EngineEvents
    _load: SGLangLoad

    def __init__(self) -> None:
        self.failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self._open: dict[ScheduledRequest, asyncio.Task[None]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._cleared = asyncio.Event()
        self._closing = False

    @classmethod
    async def start(cls, model: str, worker_id: int, flags: list[str]) -> Self:
        """Load the model, by its name on Hugging Face or from a folder in its format.

        Raises:
            OSError: there is no such model.
            ValueError: a flag is wrong, in SGLang's words, or SGLang cannot run the model.
        """
        name = served_name(model)
        engine = cls()
        engine._process = await SGLangProcess.start(model, flags, engine._fail)
        try:
            await engine._begin(name, worker_id)
        except BaseException:
            await engine.close()
            raise
        return engine

    async def _begin(self, name: str, worker_id: int) -> None:
        process = self._process
        manager = process.engine.tokenizer_manager
        state: dict[str, Any] = (await manager.get_internal_state())[0]
        block_size: int = state["page_size"]
        self._events = EngineEvents(
            process.settings.events,
            EventTranslation(block_size, has_copies=False),
            topic=process.settings.topic,
            replay=process.settings.replay,
        )
        self._events.subscribe(self._notice)
        self._load = SGLangLoad(process.engine.port_args.metrics_ipc_name, block_size)
        for work in (self._events.run(), self._load.run()):
            task = asyncio.create_task(work)
            task.add_done_callback(lambda task: complete_with_failure(self.failed, task))
            self._tasks.append(task)
        await self._events.connected()
        self.info = EngineInfo(
            model=name,
            backend="sglang",
            # It takes inputs shorter than the first, and keeps room for a page more than the second
            # has: a longer request would wait for ever.
            context_length=min(manager.max_req_input_len, process.total_tokens - 2 * block_size),
            block_size=block_size,
            total_blocks=process.total_tokens // block_size,
            worker_id=worker_id,
            max_running=state.get("effective_max_running_requests_per_dp"),
        )
        self._vocab_size: int = manager.model_config.vocab_size
        if process.settings.mode == "prefill":
            self._bootstrap = bootstrap_address(process.settings.server_args)

    def subscribe(self, callback: Callable[[list[KvEvent]], None]) -> None:
        self._events.subscribe(callback)

    def metrics(self) -> EngineMetrics:
        """The load as SGLang reported it last, with what it has been sent since then."""
        return self._load.metrics(len(self._open), self.info.total_blocks)

    def generate(
        self, request: GenerateRequest, context: RequestContext
    ) -> AsyncGenerator[EngineOutput, None]:
        """See `Engine.generate`."""
        self._check_open()
        settings = self._process.settings
        check_mode(request, settings.mode)
        scheduled = schedule(
            request,
            context,
            context_length=self.info.context_length,
            vocab_size=self._vocab_size,
            eog_ids=frozenset(),
        )
        arguments = generate_arguments(scheduled, settings)
        if request.prefill_only:
            item = scheduled.item(self.info.worker_id, [], handed_over=True)
            item.kv = new_room(scheduled, *self._bootstrap)
            scheduled.stream.put(item)
            arguments |= room_arguments(item.kv)
        elif settings.mode == "decode" and request.kv is not None:
            arguments |= room_arguments(request.kv)
        return self._stream(scheduled, arguments)

    async def clear_cache(self) -> None:
        """Forget all blocks.

        Raises:
            PipelineError: kind `overloaded`; SGLang does it only while no request is in it.
        """
        self._check_open()
        self._cleared.clear()
        result = await self._process.engine.tokenizer_manager.flush_cache()
        if not result.success:
            message = f"SGLang clears its cache only while no request is in it. {result.message}"
            raise PipelineError("overloaded", message.strip())
        try:
            await asyncio.wait_for(self._cleared.wait(), CLEARED_TIMEOUT_S)
        except TimeoutError:
            self._events.cleared()

    async def close(self) -> None:
        """Stop the engine and free its memory; running requests end as cancelled."""
        self._closing = True
        requests = list(self._open.values())
        for task in (*requests, *self._tasks):
            task.cancel()
        await asyncio.gather(*requests, *self._tasks, return_exceptions=True)
        if hasattr(self, "_load"):
            self._load.close()
            self._events.close()
        await self._process.close()

    def _fail(self, error: BaseException) -> None:
        """Nobody who waits for an engine that is gone may wait for ever."""
        if not self.failed.done():
            _log.error("the engine failed: %s", error)
            self.failed.set_result(error)
        for task in self._open.values():
            task.cancel()

    def _notice(self, events: list[KvEvent]) -> None:
        if any(isinstance(event, AllBlocksCleared) for event in events):
            self._cleared.set()

    def _check_open(self) -> None:
        if self.failed.done():
            raise self._failure()
        if self._closing:
            raise PipelineError("unavailable", "the engine is closed")

    def _failure(self) -> PipelineError:
        failure = PipelineError("internal", f"the engine failed: {self.failed.result()!r}")
        failure.__cause__ = self.failed.result()
        return failure

    async def _stream(
        self, scheduled: ScheduledRequest, arguments: dict[str, Any]
    ) -> AsyncGenerator[EngineOutput, None]:
        self._check_open()
        receiving = asyncio.create_task(self._receive(scheduled, arguments))
        self._open[scheduled] = receiving
        stopping = asyncio.create_task(_cancel_when_stopped(scheduled.context, receiving))
        try:
            over = False
            while not over:
                item = await scheduled.stream.next()
                over = item.finish_reason is not None or item.kv is not None
                yield item
            # A prefill engine's caller stays until the KV has been fetched: leaving would end it.
            await asyncio.wait([receiving])
        finally:
            stopping.cancel()
            receiving.cancel()
            await asyncio.gather(receiving, stopping, return_exceptions=True)
            self._open.pop(scheduled, None)

    async def _receive(self, scheduled: ScheduledRequest, arguments: dict[str, Any]) -> None:
        """Put what SGLang generates into the request's stream; ends it on every way out."""
        worker_id = self.info.worker_id
        try:
            stream = await self._process.engine.async_generate(
                **arguments, stream=True, rid=uuid.uuid4().hex
            )
            async with aclosing(stream):
                async for output in stream:
                    item = self._item(scheduled, output)
                    scheduled.stream.put(item)
                    if item.finish_reason is not None:
                        return
            raise PipelineError("internal", "SGLang ended a stream without saying why")
        except asyncio.CancelledError:
            if self.failed.done():
                scheduled.stream.fail(self._failure())
            else:
                scheduled.stream.put(scheduled.item(worker_id, [], finish_reason="cancelled"))
        except PipelineError as error:
            scheduled.stream.fail(error)
        except ValueError as error:  # it does not take the request
            scheduled.stream.fail(refusal(str(error)))
        except Exception as error:
            _log.exception("SGLang failed a request")
            scheduled.stream.fail(PipelineError("internal", f"SGLang failed: {error!r}"))
        finally:
            self._open.pop(scheduled, None)

    def _item(self, scheduled: ScheduledRequest, output: dict[str, Any]) -> EngineOutput:
        generated = read_output(scheduled, output)
        self._load.count(scheduled, output["meta_info"], len(generated.token_ids))
        return scheduled.item(
            self.info.worker_id, generated.token_ids, generated.logprobs, generated.finish_reason
        )


async def _cancel_when_stopped(context: RequestContext, task: asyncio.Task[None]) -> None:
    await context.async_killed_or_stopped()
    task.cancel()
