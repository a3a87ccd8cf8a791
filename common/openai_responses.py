"""Answers of OpenAI's API that are one JSON document.

Source of the shapes: https://platform.openai.com/docs/api-reference/chat/object,
`/completions/object` and `/models/list`. `system_fingerprint` is left out: it may be, and the
frontend does not know the engine's configuration. `nvext` is Dynamo's extension.
"""

import codecs
import time
from collections.abc import Iterable
from typing import Any, Literal

from common.openai_requests import ChatCompletionRequest, CompletionRequest
from common.protocol import (
    EngineInfo,
    ErrorInfo,
    LogprobEntry,
    PipelineError,
    PositionLogprobs,
    TextOutput,
    Usage,
)

import msgspec
from pydantic import BaseModel

LEAST_LOGPROB = -9999.0
"""OpenAI's stand-in for minus infinity, which JSON cannot say."""


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "dynamo-pipelines"


class ModelList(BaseModel):
    """The body of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


def model_document(info: EngineInfo, model_id: str, created: int) -> ModelCard:
    """The body of GET /v1/models/{model_id}; `created` is in seconds since 1970.

    Raises:
        PipelineError: kind `model_not_found`; the engine's model has another name.
    """
    if model_id != info.model:
        message = f"The model '{model_id}' does not exist; '{info.model}' does."
        raise PipelineError("model_not_found", message, "model")
    owner = "simulated" if info.simulated else "dynamo-pipelines"
    return ModelCard(id=info.model, created=created, owned_by=owner)


def model_list(info: EngineInfo | Iterable[str], created: int) -> ModelList:
    """The body of GET /v1/models: what is served; `created` is in seconds since 1970."""
    if isinstance(info, EngineInfo):
        return ModelList(data=[model_document(info, info.model, created)])
    return ModelList(data=[ModelCard(id=name, created=created) for name in info])


def chat_response(
    request_id: str, request: ChatCompletionRequest, outputs: list[TextOutput]
) -> bytes:
    """The JSON of a whole answer, from all the items that the processor streamed.

    Raises:
        PipelineError: an item carries an error, the answer was cancelled, or its last item is
            missing.
    """
    text, logprobs, last = _gather(outputs)
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "logprobs": {"content": chat_logprobs(logprobs), "refusal": None} if logprobs else None,
        "finish_reason": last.finish_reason,
    }
    return _response("chatcmpl-", "chat.completion", request_id, request, choice, last)


def completion_response(
    request_id: str, request: CompletionRequest, outputs: list[TextOutput]
) -> bytes:
    """Like `chat_response`, for POST /v1/completions."""
    text, logprobs, last = _gather(outputs)
    choice = {
        "index": 0,
        "text": text,
        "logprobs": TextOffsets().logprobs(logprobs) if logprobs else None,
        "finish_reason": last.finish_reason,
    }
    return _response("cmpl-", "text_completion", request_id, request, choice, last)


def failure(output: TextOutput) -> ErrorInfo | None:
    """Why this item is no part of an answer; OpenAI's API has no word for a cancelled one."""
    if output.finish_reason == "cancelled":
        return ErrorInfo("unavailable", "The answer was cancelled before it was complete.")
    return output.error


def _gather(outputs: list[TextOutput]) -> tuple[str, list[PositionLogprobs], TextOutput]:
    for output in outputs:
        if error := failure(output):
            raise PipelineError.of(error)
    if not outputs or outputs[-1].finish_reason is None:
        raise PipelineError("unavailable", "The answer ended before it was complete.")
    logprobs = [position for output in outputs for position in output.logprobs or ()]
    return "".join(output.text for output in outputs), logprobs, outputs[-1]


def _response(
    prefix: str,
    kind: str,
    request_id: str,
    request: ChatCompletionRequest | CompletionRequest,
    choice: dict[str, Any],
    last: TextOutput,
) -> bytes:
    document = {
        "id": prefix + request_id,
        "object": kind,
        "created": int(time.time()),
        "model": request.model,
        "choices": [choice],
        "usage": usage_json(last.usage) if last.usage else None,
    }
    extension = nvext_json(request.extra_fields(), last)
    if extension:
        document["nvext"] = extension
    return msgspec.json.encode(document)


def usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def nvext_json(extra_fields: frozenset[str], last: TextOutput) -> dict[str, Any]:
    """The members of `nvext` that were asked for; {} if none."""
    extension: dict[str, Any] = {}
    if "worker_id" in extra_fields:
        extension["worker_id"] = last.worker_id
    if "timing" in extra_fields:
        extension["timing"] = last.timings
    return extension


def chat_logprobs(positions: list[PositionLogprobs]) -> list[dict[str, Any]]:
    return [
        {**_entry(position.chosen), "top_logprobs": [_entry(entry) for entry in position.top]}
        for position in positions
    ]


def _entry(entry: LogprobEntry) -> dict[str, Any]:
    return {"token": entry.token, "logprob": _finite(entry.logprob), "bytes": entry.bytes}


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


class TextOffsets:
    """Logprobs in the older shape of /v1/completions, which counts characters.

    `text_offset` is where in the answer the character begins that a token begins or goes on.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def logprobs(self, positions: list[PositionLogprobs]) -> dict[str, Any]:
        offsets = []
        for position in positions:
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(bytes(position.chosen.bytes)))
        return {
            "tokens": [position.chosen.token for position in positions],
            "token_logprobs": [_finite(position.chosen.logprob) for position in positions],
            "top_logprobs": [_by_token(position) for position in positions],
            "text_offset": offsets,
        }


def _by_token(position: PositionLogprobs) -> dict[str, float]:
    """The best tokens and the chosen one; of tokens with the same text, the likeliest."""
    by_token: dict[str, float] = {}
    for entry in [*position.top, position.chosen]:
        by_token.setdefault(entry.token, _finite(entry.logprob))
    return by_token
