"""A request inside an engine: its limits, how far it is, and the items it sends back."""

import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

from common.engines.base import RequestContext
from common.engines.output_stream import OutputStream
from common.protocol import (
    EngineOutput,
    EngineTimings,
    FinishReason,
    GenerateRequest,
    PipelineError,
    SamplingParams,
    TokenLogprobs,
)


class ReceivedKv(Protocol):
    """KV that another engine computed: that of the blocks from number `first` to token `tokens`."""

    @property
    def first(self) -> int: ...

    @property
    def tokens(self) -> int: ...


@dataclass(eq=False, slots=True)
class ScheduledRequest:
    """A request on its way through an engine.

    `tokens` is the prompt and, after it, the output, of which another engine may have
    `generated` the beginning; `received` is what is still to be taken over of that one's KV.
    With `prefill_only` another engine goes on after the first token. For `retain_s` after its
    end its blocks are to be kept. `block_hashes` are those of
    the full blocks of `tokens` when it began to wait. `closed` is set when the caller has left.
    Times are in seconds of `time.perf_counter`.
    """

    tokens: list[int]
    max_tokens: int
    stop_ids: frozenset[int]
    sampling: SamplingParams
    context: RequestContext
    generated: int = 0
    prefill_only: bool = False
    received: ReceivedKv | None = None
    retain_s: float = 0.0
    stream: OutputStream = field(default_factory=OutputStream)
    block_hashes: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    arrived: float = field(default_factory=time.perf_counter)
    started: float | None = None
    first_token: float | None = None
    prompt_length: int = field(init=False)
    closed: bool = False
    _sent: bool = False

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens) - self.generated

    @property
    def output_length(self) -> int:
        """With what another engine generated."""
        return len(self.tokens) - self.prompt_length

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    def next_block_received(self, computed: int, block_size: int) -> int | None:
        """The number of the received block that follows `computed` tokens, if there is one."""
        block, inside = divmod(computed, block_size)
        received = self.received
        if received is None or inside or block < received.first or computed >= received.tokens:
            return None
        return block

    def is_stopped(self) -> bool:
        """Whether the caller wants no more."""
        return self.closed or self.context.is_stopped()

    def item(
        self,
        worker_id: int,
        token_ids: list[int],
        logprobs: list[TokenLogprobs] | None = None,
        finish_reason: FinishReason | None = None,
        *,
        handed_over: bool = False,
    ) -> EngineOutput:
        """The next item of the stream, with what belongs to the first and to the last one."""
        item = EngineOutput(token_ids=token_ids, logprobs=logprobs, finish_reason=finish_reason)
        if not self._sent:
            item.worker_id, item.cached_tokens = worker_id, self.cached_tokens
            self._sent = True
        if finish_reason is not None or handed_over:
            now = time.perf_counter()
            started = self.started or now
            first_token = self.first_token or now
            item.timings = EngineTimings(
                queue_ms=(started - self.arrived) * 1e3,
                prefill_ms=(first_token - started) * 1e3,
                decode_ms=(now - first_token) * 1e3,
            )
        return item

    async def items(
        self, submit: Callable[[], Awaitable[None]]
    ) -> AsyncGenerator[EngineOutput, None]:
        """Submit the request and read its stream; leaving early stops the request."""
        await submit()
        try:
            over = False
            while not over:
                item = await self.stream.next()
                over = item.finish_reason is not None or item.kv is not None
                yield item
        finally:
            self.closed = True


def schedule(
    request: GenerateRequest,
    context: RequestContext,
    *,
    context_length: int,
    vocab_size: int,
    eog_ids: frozenset[int],
) -> ScheduledRequest:
    """Check a request against the engine's limits and make it ready for the scheduler.

    Raises:
        PipelineError: kind `invalid_request`, naming the field and the limit.
    """
    sampling = request.sampling
    generated = request.generated
    if not request.token_ids:
        raise PipelineError("invalid_request", "the prompt is empty", "token_ids")
    if not 0 <= generated < len(request.token_ids):
        raise PipelineError(
            "invalid_request",
            f"generated is {generated}; of {len(request.token_ids)} token ids it must be from 0 to "
            f"{len(request.token_ids) - 1}",
            "generated",
        )
    prompt = len(request.token_ids) - generated
    room = context_length - prompt
    if room < 1:
        raise PipelineError(
            "invalid_request",
            f"the prompt has {prompt} tokens, but the context length is {context_length} tokens "
            "and must also have room for one token of output",
            "token_ids",
            code="context_length_exceeded",
        )
    if sampling.max_tokens is not None and not 1 <= sampling.max_tokens <= room:
        raise PipelineError(
            "invalid_request",
            f"max_tokens is {sampling.max_tokens}; with a prompt of {prompt} tokens and a context "
            f"length of {context_length} tokens it must be from 1 to {room}",
            "max_tokens",
        )
    max_tokens = room if sampling.max_tokens is None else sampling.max_tokens
    if not 0 <= sampling.min_tokens <= max_tokens:
        raise PipelineError(
            "invalid_request",
            f"min_tokens is {sampling.min_tokens}; it must be from 0 to {max_tokens}",
            "min_tokens",
        )
    if generated >= max_tokens:
        raise PipelineError(
            "invalid_request",
            f"generated is {generated}; with room for {max_tokens} tokens of output nothing is "
            "left to generate",
            "generated",
        )
    if sampling.logprobs is not None and not 0 <= sampling.logprobs <= vocab_size:
        raise PipelineError(
            "invalid_request",
            f"logprobs is {sampling.logprobs}; it must be from 0 to {vocab_size}",
            "logprobs",
        )
    _check_ids("token_ids", request.token_ids, vocab_size)
    _check_ids("stop_token_ids", sampling.stop_token_ids, vocab_size)
    _check_ids("logit_bias", [token for token, _ in sampling.logit_bias], vocab_size)
    stop_ids = frozenset(sampling.stop_token_ids)
    return ScheduledRequest(
        tokens=list(request.token_ids),
        max_tokens=max_tokens,
        stop_ids=stop_ids if sampling.ignore_eos else stop_ids | eog_ids,
        sampling=sampling,
        context=context,
        generated=generated,
        prefill_only=request.prefill_only,
        retain_s=request.retain_s,
    )


def _check_ids(name: str, ids: list[int], vocab_size: int) -> None:
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        raise PipelineError(
            "invalid_request",
            f"{name} has {wrong}; token ids are from 0 to {vocab_size - 1}",
            name,
        )
