"""One request inside vLLM: from vLLM's stream to ours."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from common.engines.json_schema import schema_error
from common.engines.scheduled_request import ScheduledRequest
from common.engines.vllm_sampling import decode_params, prefill_params, refusal, token_logprobs
from common.engines.vllm_stats import VllmStats
from common.protocol import EngineOutput, FinishReason, PipelineError
from common.protocol_transfer import KvDescriptor

KV_KIND = "vllm"
_REASONS: dict[str | None, FinishReason] = {"length": "length", "abort": "cancelled"}

_log = logging.getLogger(__name__)


class VllmRequest:
    """`failure` gives the error to tell once the engine has failed."""

    def __init__(
        self,
        llm: Any,
        scheduled: ScheduledRequest,
        worker_id: int,
        stats: VllmStats,
        failure: Callable[[], PipelineError | None],
        *,
        prefill_only: bool,
        kv_transfer: dict[str, Any] | None,
    ) -> None:
        self._llm = llm
        self._scheduled = scheduled
        self._worker_id = worker_id
        self._stats = stats
        self._failure = failure
        self._prefill_only = prefill_only
        self._kv_transfer = kv_transfer
        self._params = prefill_params() if prefill_only else decode_params(scheduled, kv_transfer)
        self._began = False
        self._reading: asyncio.Task[None] | None = None

    async def items(self) -> AsyncGenerator[EngineOutput, None]:
        """The request's stream; it ends when the context stops, or `stop` is called."""
        self._reading = reading = asyncio.create_task(self._read())
        reading.add_done_callback(self._ended)
        stopped = asyncio.ensure_future(self._scheduled.context.async_killed_or_stopped())
        stopped.add_done_callback(lambda _: reading.cancel())
        try:
            over = False
            while not over:
                item = await self._scheduled.stream.next()
                over = item.finish_reason is not None or item.kv is not None
                yield item
        finally:
            stopped.cancel()
            reading.cancel()
            await asyncio.gather(stopped, reading, return_exceptions=True)

    def stop(self) -> asyncio.Task[None] | None:
        """End it as cancelled, or with the engine's failure; the task that does so, if it ran."""
        if self._reading is not None:
            self._reading.cancel()
        return self._reading

    async def _read(self) -> None:
        if self._kv_transfer is None or not await self._generate(may_fail=True):
            await self._generate()

    def _ended(self, reading: asyncio.Task[None]) -> None:
        """However that was: nobody may wait for more."""
        error = None if reading.cancelled() else reading.exception()
        if isinstance(error, PipelineError):
            self._scheduled.stream.fail(error)
        elif (error or reading.cancelled()) and (failure := self._failure()):
            self._scheduled.stream.fail(failure)
        elif isinstance(error, Exception):
            self._scheduled.stream.fail(self._error(error))
        elif reading.cancelled():
            self._scheduled.stream.put(self._item(reason="cancelled"))

    async def _generate(self, *, may_fail: bool = False) -> bool:
        """Run the request in vLLM; False if it came to nothing because of the KV to fetch."""
        prompt = {"prompt_token_ids": self._scheduled.tokens}
        name = uuid.uuid4().hex
        try:
            async with aclosing(self._llm.generate(prompt, self._params, name)) as outputs:
                async for output in outputs:
                    if output.outputs[0].finish_reason in ("error", "repetition"):
                        reason = output.outputs[0].finish_reason
                        if self._scheduled.sampling.json_schema is not None:
                            raise schema_error(f"vLLM could not keep to it ({reason})")
                        raise PipelineError("internal", f"vLLM ended the request: {reason}")
                    self._put(output)
        except asyncio.CancelledError:
            # vLLM itself has not done so if it had not quite taken the request.
            await self._llm.abort(name)
            raise
        except Exception as error:
            if not may_fail or self._began or self._failure():
                raise
            _log.warning("KV of another engine cannot be had (%r); computing the prompt", error)
            self._params = decode_params(self._scheduled, None)
            return False
        return True

    def _put(self, output: Any) -> None:
        completion = output.outputs[0]
        if not self._began:
            self._begin(output)
        if self._prefill_only:
            if output.finished:
                self._hand_over(output.kv_transfer_params)
            return
        token_ids = list(completion.token_ids)
        reason: FinishReason | None = None
        if completion.finish_reason is not None:
            reason = _REASONS.get(completion.finish_reason, "stop")
            if reason == "stop":
                token_ids = token_ids[:-1]  # the last one is what it stopped at
        logprobs = None
        count = self._scheduled.sampling.logprobs
        if count is not None and token_ids:
            logprobs = token_logprobs(token_ids, completion.logprobs[: len(token_ids)], count)
        self._stats.output_tokens += len(token_ids)
        if token_ids or reason is not None:
            self._scheduled.stream.put(
                self._scheduled.item(self._worker_id, token_ids, logprobs, reason)
            )

    def _begin(self, output: Any) -> None:
        """With the first token it is known what was cached and how long it took."""
        self._began = True
        scheduled, stats = self._scheduled, output.metrics
        now = time.perf_counter()
        scheduled.first_token = scheduled.started = now
        if stats is not None:
            scheduled.started = now - max(stats.first_token_ts - stats.scheduled_ts, 0.0)
        scheduled.cached_tokens = output.num_cached_tokens or 0
        self._stats.prompt_tokens += len(scheduled.tokens)
        self._stats.cached_tokens += scheduled.cached_tokens

    def _hand_over(self, kv_transfer: dict[str, Any] | None) -> None:
        if not kv_transfer:
            raise PipelineError("unavailable", "vLLM's KV connector keeps no KV for other engines")
        item = self._item(handed_over=True)
        item.kv = KvDescriptor(KV_KIND, len(self._scheduled.tokens), kv_transfer)
        self._scheduled.stream.put(item)

    def _item(
        self, *, reason: FinishReason | None = None, handed_over: bool = False
    ) -> EngineOutput:
        return self._scheduled.item(
            self._worker_id, [], finish_reason=reason, handed_over=handed_over
        )

    def _error(self, error: Exception) -> PipelineError:
        from vllm.exceptions import GracefulHTTPError, VLLMClientError

        if isinstance(error, GracefulHTTPError):
            return PipelineError("overloaded", str(error))
        if isinstance(error, VLLMClientError | ValueError):
            return refusal(error, self._scheduled.sampling)
        return PipelineError("internal", f"vLLM failed: {error.__cause__ or error!r}")
