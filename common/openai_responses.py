"""Answers of OpenAI's API that are one JSON document, from what the processor streamed.

Source of the models' shapes: https://platform.openai.com/docs/api-reference/models; the
others are in `openai_objects`.
"""

import codecs
import time
from typing import Literal, NamedTuple

from common.openai_objects import (
    AssistantMessage,
    CalledFunction,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatPosition,
    ChatToken,
    CompleteReason,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Extension,
    ToolCallObject,
    UsageDetails,
    UsageObject,
)
from common.openai_requests import ChatRequest, CompletionRequest
from common.protocol import (
    EngineInfo,
    ErrorInfo,
    PipelineError,
    PositionLogprobs,
    TextOutput,
    Usage,
)
from common.protocol_tools import ToolCall, ToolCallDelta

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import BaseModel

LEAST_LOGPROB = -9999.0
"""OpenAI's stand-in for minus infinity, which JSON cannot say."""


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


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
        message = f"The model {model_id[:80]!r} does not exist; '{info.model}' does."
        raise PipelineError("model_not_found", message, "model")
    owner = "simulated" if info.simulated else "dynamo-pipelines"
    return ModelCard(id=info.model, created=created, owned_by=owner)


def model_list(info: EngineInfo, created: int) -> ModelList:
    """The body of GET /v1/models: what is served; `created` is in seconds since 1970."""
    return ModelList(data=[model_document(info, info.model, created)])


def chat_response(request_id: str, request: ChatRequest, outputs: list[TextOutput]) -> bytes:
    """The JSON of a whole answer, from all the items that the processor streamed.

    Raises:
        PipelineError: an item carries an error, the answer was cancelled, or its last item is
            missing.
    """
    text, logprobs, finish_reason, last = _gather(outputs)
    calls = [
        ToolCallObject(call.id, "function", CalledFunction(call.name, call.arguments))
        for call in gather_calls([delta for output in outputs for delta in output.tool_calls])
    ]
    choice = ChatChoice(
        index=0,
        message=AssistantMessage(
            role="assistant",
            content=None if calls and not text else text,
            tool_calls=calls or UNSET,
        ),
        logprobs=chat_logprobs(logprobs) if logprobs else None,
        finish_reason=finish_reason,
    )
    document = ChatCompletion(
        id=f"chatcmpl-{request_id}",
        object="chat.completion",
        created=int(time.time()),
        model=request.model,
        choices=[choice],
        usage=usage_object(last.usage) if last.usage else None,
        nvext=extension(request.extra_fields(), last),
    )
    return msgspec.json.encode(document)


def completion_response(
    request_id: str, request: CompletionRequest, outputs: list[TextOutput]
) -> bytes:
    """Like `chat_response`, for POST /v1/completions."""
    text, logprobs, finish_reason, last = _gather(outputs)
    choice = CompletionChoice(
        index=0,
        text=text,
        logprobs=TextOffsets().logprobs(logprobs) if logprobs else None,
        finish_reason=finish_reason,
    )
    document = Completion(
        id=f"cmpl-{request_id}",
        object="text_completion",
        created=int(time.time()),
        model=request.model,
        choices=[choice],
        usage=usage_object(last.usage) if last.usage else None,
        nvext=extension(request.extra_fields(), last),
    )
    return msgspec.json.encode(document)


def failure(output: TextOutput) -> ErrorInfo | None:
    """Why this item is no part of an answer; OpenAI's API has no word for a cancelled one."""
    if output.finish_reason == "cancelled":
        return ErrorInfo("unavailable", "The answer was cancelled before it was complete.")
    return output.error


def gather_calls(deltas: list[ToolCallDelta]) -> list[ToolCall]:
    """The calls whose pieces these are, in order."""
    calls: dict[int, ToolCall] = {}
    for delta in deltas:
        call = calls.setdefault(delta.index, ToolCall(delta.id or "", delta.name or "", ""))
        call.arguments += delta.arguments
    return [calls[index] for index in sorted(calls)]


class _Answer(NamedTuple):
    text: str
    logprobs: list[PositionLogprobs]
    finish_reason: CompleteReason
    last: TextOutput


def _gather(outputs: list[TextOutput]) -> _Answer:
    for output in outputs:
        if error := failure(output):
            raise PipelineError.of(error)
    finish_reason = outputs[-1].finish_reason if outputs else None
    if finish_reason is None or finish_reason == "cancelled":
        raise PipelineError("unavailable", "The answer ended before it was complete.")
    logprobs = [position for output in outputs for position in output.logprobs or ()]
    text = "".join(output.text for output in outputs)
    return _Answer(text, logprobs, finish_reason, outputs[-1])


def usage_object(usage: Usage) -> UsageObject:
    return UsageObject(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=UsageDetails(usage.cached_tokens),
    )


def extension(extra_fields: frozenset[str], last: TextOutput) -> Extension | UnsetType:
    """The members of `nvext` that were asked for."""
    if not extra_fields:
        return UNSET
    return Extension(
        worker_id=last.worker_id if "worker_id" in extra_fields else UNSET,
        timing=last.timings if "timing" in extra_fields else UNSET,
    )


def chat_logprobs(positions: list[PositionLogprobs]) -> ChatLogprobs:
    return ChatLogprobs(
        [
            ChatPosition(
                token=position.chosen.token,
                logprob=_finite(position.chosen.logprob),
                bytes=position.chosen.bytes,
                top_logprobs=[
                    ChatToken(entry.token, _finite(entry.logprob), entry.bytes)
                    for entry in position.top
                ],
            )
            for position in positions
        ]
    )


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


class TextOffsets:
    """Logprobs in the older shape of /v1/completions, which counts characters.

    `text_offset` is where in the answer the character begins that a token begins or goes on.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def logprobs(self, positions: list[PositionLogprobs]) -> CompletionLogprobs:
        offsets = []
        for position in positions:
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(bytes(position.chosen.bytes)))
        return CompletionLogprobs(
            tokens=[position.chosen.token for position in positions],
            token_logprobs=[_finite(position.chosen.logprob) for position in positions],
            top_logprobs=[_by_token(position) for position in positions],
            text_offset=offsets,
        )


def _by_token(position: PositionLogprobs) -> dict[str, float]:
    """The best tokens and the chosen one; of tokens with the same text, the likeliest."""
    by_token: dict[str, float] = {}
    for entry in [*position.top, position.chosen]:
        by_token.setdefault(entry.token, _finite(entry.logprob))
    return by_token
