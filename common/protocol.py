"""Messages between components.

The runtime carries plain msgpack values, so a message is a `msgspec.Struct` that becomes a
dict with `to_wire` and is checked on arrival with `from_wire`. Fields at their default do
not travel, which keeps the item of a single token small.

    frontend --ProcessRequest-->  processor --GenerateRequest--> engine
    frontend <--TextOutput------  processor <--EngineOutput----- engine
"""

from typing import Any, Literal, TypeVar

from common.protocol_errors import ErrorInfo as ErrorInfo
from common.protocol_errors import ErrorKind as ErrorKind
from common.protocol_errors import PipelineError as PipelineError
from common.protocol_errors import hop_error as hop_error
from common.protocol_tools import ToolCall, ToolCallDelta
from common.protocol_transfer import KvDescriptor

import msgspec

FinishReason = Literal["stop", "length", "cancelled"]
AnswerReason = FinishReason | Literal["tool_calls"]


class SamplingParams(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """How to choose tokens and when to stop; ranges are checked by the frontend.

    `max_tokens=None` means "as many as the context has room for". `temperature=0` is greedy.
    `top_k=0` and `min_p=0` are off. `logprobs=k` asks for the chosen token's log probability
    and those of the `k` most likely tokens (`k=0`: the chosen token's alone).
    `json_schema` is the text of a JSON schema that the output must match.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: list[tuple[int, float]] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    logprobs: int | None = None
    json_schema: str | None = None


class GenerateRequest(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """Token ids in: the input of `engine.generate`.

    With `generated` the request goes on with an output that another engine began: that many of
    the last `token_ids` are output already. They count for `max_tokens`, `min_tokens`, the
    penalties, the seed's random numbers and the JSON schema, and do not come again.

    With `prefill_only` the engine computes the prompt for another one, to which the item with
    `EngineOutput.kv` hands the request over. That one gets its `kv`: the KV of the first tokens
    need not be computed but can be fetched.

    `retain_s` asks to keep the blocks of the request for so long after its end while others can
    be evicted instead, of at most half of the cache. SGLang and vLLM have no such time: ignored.
    """

    token_ids: list[int]
    sampling: SamplingParams = msgspec.field(default_factory=SamplingParams)
    generated: int = 0
    prefill_only: bool = False
    kv: KvDescriptor | None = None
    retain_s: float = 0.0


class TokenLogprobs(msgspec.Struct, omit_defaults=True):
    """Natural-log probabilities at one output position: the chosen token's, and the top `k`."""

    logprob: float
    top: list[tuple[int, float]] = []


class EngineTimings(msgspec.Struct, omit_defaults=True):
    """Milliseconds a request spent in the engine, by phase."""

    queue_ms: float
    prefill_ms: float
    decode_ms: float


class EngineOutput(msgspec.Struct, omit_defaults=True):
    """Token ids out: one item of the stream of `engine.generate`.

    An item has all the tokens that were ready, one or more; `logprobs` is parallel to
    `token_ids`. `worker_id` and `cached_tokens` (input tokens whose KV was reused) come with
    the first item; `finish_reason` and `timings` with the last. An `error` item ends the
    stream.

    Of a request that is `prefill_only`, and not over yet, an item with `kv` takes the place of
    the last one; it has the first token if the backend makes it there.
    """

    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    worker_id: int | None = None
    cached_tokens: int | None = None
    finish_reason: FinishReason | None = None
    timings: EngineTimings | None = None
    error: ErrorInfo | None = None
    kv: KvDescriptor | None = None


class EngineInfo(msgspec.Struct, omit_defaults=True):
    """What an engine is: the answer of `engine.info`. Sizes are in tokens or blocks.

    `max_running` requests run at once, if it knows; more wait in it.
    """

    model: str
    backend: str
    context_length: int
    block_size: int
    total_blocks: int
    worker_id: int = 0
    simulated: bool = False
    max_running: int | None = None


class InfoOutput(msgspec.Struct, omit_defaults=True):
    """The answer of `processor.info`: what the engine behind it is, or why that is not known."""

    engine: EngineInfo | None = None
    error: ErrorInfo | None = None


class EngineMetrics(msgspec.Struct, omit_defaults=True):
    """An engine's load at one moment; counters run since its start.

    `used_blocks` are those of running requests' prompts and outputs, computed or not yet.
    `received_tokens` are prompt tokens whose KV came from another engine; `failed_transfers`
    counts prompts that were computed here because their KV did not come. `retained_blocks` are
    kept for requests that are to come; others may have them when nothing else is left.
    """

    running: int
    waiting: int
    used_blocks: int
    total_blocks: int
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    received_tokens: int = 0
    failed_transfers: int = 0
    retained_blocks: int = 0


class ChatMessage(msgspec.Struct, omit_defaults=True):
    """One turn of a conversation, content already reduced to text.

    An assistant's may have `tool_calls`; a tool's answers the call `tool_call_id`.
    """

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    tool_calls: list[ToolCall] = []
    tool_call_id: str | None = None


class ProcessRequest(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """The input of `processor.process`; exactly one of `messages` and `prompt` is given.

    `stop` holds stop strings; stop token ids are in `sampling`.
    """

    model: str
    messages: list[ChatMessage] | None = None
    prompt: str | list[int] | None = None
    sampling: SamplingParams = msgspec.field(default_factory=SamplingParams)
    stop: list[str] = []


class LogprobEntry(msgspec.Struct, omit_defaults=True):
    """One token as text, with its raw UTF-8 bytes (a token may be part of a character)."""

    token: str
    logprob: float
    bytes: list[int]


class PositionLogprobs(msgspec.Struct, omit_defaults=True):
    """The chosen token at one position and the most likely ones, best first."""

    chosen: LogprobEntry
    top: list[LogprobEntry] = []


class Usage(msgspec.Struct, omit_defaults=True):
    """Token counts of one request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class Timings(msgspec.Struct, omit_defaults=True):
    """Milliseconds in each component, as far as the processor can see."""

    tokenize_ms: float
    total_ms: float
    engine: EngineTimings | None = None


class TextOutput(msgspec.Struct, omit_defaults=True):
    """Text out: one item of the stream of `processor.process`.

    `text` may be empty (a token that completes no character); `tokens` counts the tokens that
    this item covers. `tool_calls` are pieces of calls of the request's tools. `usage`, `timings`
    and `worker_id` come with the last item. `migrations` is how often the answer has moved to
    another engine since the item before.
    """

    text: str = ""
    tokens: int = 0
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: AnswerReason | None = None
    tool_calls: list[ToolCallDelta] = []
    usage: Usage | None = None
    timings: Timings | None = None
    worker_id: int | None = None
    migrations: int = 0
    error: ErrorInfo | None = None


T = TypeVar("T")


def to_wire(message: msgspec.Struct) -> dict[str, Any]:
    """The message as the plain dict that the runtime carries."""
    wire: dict[str, Any] = msgspec.to_builtins(message)
    return wire


def from_wire(value: Any, message_type: type[T]) -> T:
    """The dict that arrived, checked and typed.

    Raises:
        PipelineError: kind `invalid_request`, naming the field and what was expected.
    """
    try:
        return msgspec.convert(value, message_type)
    except msgspec.ValidationError as error:
        raise PipelineError("invalid_request", f"{message_type.__name__}: {error}") from error
