"""The JSON objects that OpenAI's API answers with.

Source: https://platform.openai.com/docs/api-reference/chat/object, `/completions/object` and
`/guides/error-codes`. `system_fingerprint` is left out: it may be, and the frontend does not
know the engine's configuration. `nvext` is Dynamo's extension.
"""

from typing import Literal

from common.protocol import Timings

import msgspec
from msgspec import UNSET, UnsetType

CompleteReason = Literal["stop", "length", "tool_calls"]


class UsageDetails(msgspec.Struct):
    cached_tokens: int


class UsageObject(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: UsageDetails


class Extension(msgspec.Struct):
    """What was asked for with `nvext.extra_fields`."""

    worker_id: int | UnsetType | None = UNSET
    timing: Timings | UnsetType | None = UNSET


class ChatToken(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class ChatPosition(ChatToken):
    top_logprobs: list[ChatToken]


class ChatLogprobs(msgspec.Struct):
    content: list[ChatPosition]
    refusal: None = None


class CalledFunction(msgspec.Struct):
    name: str
    arguments: str


class ToolCallObject(msgspec.Struct):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(msgspec.Struct):
    """The content is null where there is none beside calls of tools."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCallObject] | UnsetType = UNSET


class ChatChoice(msgspec.Struct):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: CompleteReason


class ChatCompletion(msgspec.Struct):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageObject | None
    nvext: Extension | UnsetType = UNSET


class CompletionLogprobs(msgspec.Struct):
    """Parallel lists; `text_offset` counts characters of the answer."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: CompleteReason


class Completion(msgspec.Struct):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageObject | None
    nvext: Extension | UnsetType = UNSET


class ErrorObject(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorDocument(msgspec.Struct):
    error: ErrorObject
