"""What SGLang generates, and why it refuses or gives up, in our words."""

from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from common.engines.json_schema import schema_error
from common.engines.scheduled_request import ScheduledRequest
from common.protocol import FinishReason, PipelineError, TokenLogprobs
from common.protocol_errors import ErrorKind

# SGLang's names of what it may refuse.
_PARAMS = {
    "frequency_penalty": "frequency_penalty",
    "grammar": "json_schema",
    "logit_bias": "logit_bias",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "min_p": "min_p",
    "presence_penalty": "presence_penalty",
    "sampling_seed": "seed",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
}


@dataclass(frozen=True, slots=True)
class Generated:
    """One output of SGLang: its tokens without the one that ended it."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason | None


def read_output(request: ScheduledRequest, output: dict[str, Any]) -> Generated:
    """Read one item of `Engine.async_generate`'s stream.

    Raises:
        PipelineError: SGLang has refused the request, or given it up.
    """
    tokens: list[int] = output.get("output_ids") or []
    meta = output["meta_info"]
    finish = meta.get("finish_reason") or {}
    reason: FinishReason | None = finish.get("type")
    if finish.get("type") == "abort":
        if finish.get("status_code") is not None:
            raise refusal(finish.get("message", "it gave up"), finish["status_code"])
        if request.sampling.json_schema is not None and not request.context.is_stopped():
            raise schema_error("SGLang could not keep to it and gave the request up")
        tokens, reason = [], "cancelled"
    elif reason == "stop" and tokens and tokens[-1] == finish.get("matched"):
        tokens = tokens[:-1]
    if request.sampling.ignore_eos:
        # SGLang takes that for "no stop id at all".
        stop = next((i for i, token in enumerate(tokens) if token in request.stop_ids), None)
        if stop is not None:
            tokens, reason = tokens[:stop], "stop"
    logprobs = None
    if request.sampling.logprobs is not None:
        logprobs = _logprobs(meta, len(tokens))
    return Generated(tokens, logprobs, reason)


def refusal(message: str, status: int = HTTPStatus.BAD_REQUEST) -> PipelineError:
    """The error that says what SGLang said, and the field that it said it about."""
    kind: ErrorKind = "internal"
    if status == HTTPStatus.BAD_REQUEST:
        kind = "invalid_request"
    elif status == HTTPStatus.SERVICE_UNAVAILABLE:
        kind = "overloaded"
    param = None
    if kind == "invalid_request":
        known = (ours for name, ours in _PARAMS.items() if name in message)
        param = next(known, "token_ids" if "input" in message.lower() else None)
    return PipelineError(kind, f"SGLang: {message.strip()}", param)


def _logprobs(meta: dict[str, Any], count: int) -> list[TokenLogprobs]:
    chosen = meta["output_token_logprobs"][:count]
    tops = meta.get("output_top_logprobs") or [None] * count
    return [
        TokenLogprobs(logprob, [(token, value) for value, token, _ in top or ()])
        for (logprob, _, _), top in zip(chosen, tops, strict=False)
    ]
