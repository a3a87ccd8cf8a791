"""Requests of OpenAI's API: what is accepted, and what it means to the pipeline.

Every parameter is honoured or refused with an error that names it; a refused one is accepted
with a value that asks for nothing, see `openai_unsupported`. Source of names, ranges
and defaults: https://platform.openai.com/docs/api-reference/chat/create and `/completions`;
`top_k`, `min_p`, `min_tokens`, `ignore_eos`, `stop_token_ids` are vLLM's extensions, `nvext`
is Dynamo's.
"""

from typing import Annotated, Literal, Self

from common.openai_fields import StrictModel, bad_value, parse
from common.openai_messages import Message, ResponseFormat
from common.openai_unsupported import PARAMETERS, STREAM_OPTIONS
from common.openai_values import (
    MAX_TOKEN_ID,
    Bias,
    Label,
    Penalty,
    Prompt,
    Stop,
    TokenCount,
    TokenId,
    TokenKey,
)
from common.protocol import ChatMessage, ProcessRequest, SamplingParams

from pydantic import Field, model_validator

COMPLETION_TOKENS = 16
"""OpenAI's default limit of POST /v1/completions; a chat has none but the context."""


class StreamOptions(StrictModel):
    unsupported = STREAM_OPTIONS

    include_usage: bool | None = None


class Nvext(StrictModel):
    extra_fields: Annotated[list[Literal["worker_id", "timing"]], Field(default_factory=list)]


class GenerationRequest(StrictModel):
    """What both kinds of request have in common. Absent and null mean the default."""

    unsupported = PARAMETERS

    model: Annotated[Label, Field(description="the id of a model of GET /v1/models")]
    max_tokens: Annotated[
        TokenCount | None, Field(description="an integer from 1; default: what the context holds")
    ] = None
    min_tokens: Annotated[
        int | None, Field(ge=0, le=MAX_TOKEN_ID, description="an integer from 0 to max_tokens")
    ] = None
    temperature: Annotated[
        float | None, Field(ge=0, le=2, description="a number from 0 (greedy) to 2; default 1")
    ] = None
    top_p: Annotated[
        float | None,
        Field(ge=0, le=1, description="a number from 0 (the most likely token) to 1; default 1"),
    ] = None
    top_k: Annotated[
        int | None,
        Field(ge=-1, le=MAX_TOKEN_ID, description="an integer from 1; 0 or -1 turn it off"),
    ] = None
    min_p: Annotated[float | None, Field(ge=0, le=1, description="a number from 0 (off) to 1")] = (
        None
    )
    # Not Literal[1], which takes true and 1.0 as well.
    n: Annotated[int | None, Field(ge=1, le=1, description="1: one choice a request")] = None
    stop: Annotated[
        Stop | None, Field(description="a non-empty string, or a list of up to 4 of them")
    ] = None
    stop_token_ids: Annotated[
        list[TokenId] | None, Field(max_length=64, description="a list of up to 64 token ids")
    ] = None
    ignore_eos: Annotated[
        bool | None, Field(description="true: go on after an end token; default false")
    ] = None
    seed: Annotated[
        int | None, Field(ge=-(2**63), lt=2**63, description="a 64-bit signed integer")
    ] = None
    frequency_penalty: Annotated[
        Penalty | None, Field(description="a number from -2 to 2; default 0")
    ] = None
    presence_penalty: Annotated[
        Penalty | None, Field(description="a number from -2 to 2; default 0")
    ] = None
    logit_bias: Annotated[
        dict[TokenKey, Bias] | None,
        Field(max_length=1024, description="up to 1024 token ids with a bias from -100 to 100"),
    ] = None
    stream: Annotated[bool | None, Field(description="true or false")] = None
    stream_options: Annotated[
        StreamOptions | None,
        Field(description='{"include_usage": true or false}, only with stream: true'),
    ] = None
    user: Annotated[
        Label | None, Field(description="a label for the server's log, up to 512 characters")
    ] = None
    nvext: Annotated[
        Nvext | None,
        Field(description='{"extra_fields": [...]} with any of "worker_id", "timing"'),
    ] = None

    @model_validator(mode="after")
    def check_generation(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise bad_value("Only allowed with 'stream': true.", "stream_options")
        limit = self.token_limit()
        if limit is not None and (self.min_tokens or 0) > limit:
            raise bad_value(f"Above the limit of {limit} tokens.", "min_tokens")
        return self

    def token_limit(self) -> int | None:
        """The most tokens to generate; None: as many as the context has room for."""
        return self.max_tokens

    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def field_names(self) -> dict[str, str]:
        """What the client calls the fields that the pipeline has other names for."""
        return {"token_ids": "prompt"}

    def extra_fields(self) -> frozenset[str]:
        """The members of `nvext` that the answer shall have."""
        return frozenset(self.nvext.extra_fields if self.nvext else ())

    def sampling(self, *, logprobs: int | None, json_schema: str | None) -> SamplingParams:
        """The parameters as the engine takes them."""
        temperature = 1.0 if self.temperature is None else self.temperature
        top_p = 1.0 if self.top_p is None else self.top_p
        if top_p == 0:  # the smallest set of tokens that may be chosen: the most likely one
            temperature, top_p = 0.0, 1.0
        return SamplingParams(
            max_tokens=self.token_limit(),
            min_tokens=self.min_tokens or 0,
            temperature=temperature,
            top_p=top_p,
            top_k=max(self.top_k or 0, 0),
            min_p=self.min_p or 0.0,
            seed=self.seed,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            logit_bias=list((self.logit_bias or {}).items()),
            stop_token_ids=self.stop_token_ids or [],
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
            json_schema=json_schema,
        )


class ChatRequest(GenerationRequest):
    """A chat, whatever its messages may be."""

    max_completion_tokens: Annotated[
        TokenCount | None, Field(description="an integer from 1, the new name of max_tokens")
    ] = None
    logprobs: Annotated[bool | None, Field(description="true or false")] = None
    top_logprobs: Annotated[
        int | None, Field(ge=0, le=20, description="an integer from 0 to 20, with logprobs: true")
    ] = None
    response_format: Annotated[
        ResponseFormat | None,
        Field(
            description='{"type": "text"}, {"type": "json_object"}, or {"type": "json_schema", '
            '"json_schema": {"name": ..., "schema": {...} (default: any object), "strict": ...}}'
        ),
    ] = None

    @model_validator(mode="after")
    def check_together(self) -> Self:
        limits = (self.max_tokens, self.max_completion_tokens)
        if None not in limits and limits[0] != limits[1]:
            raise bad_value("Differs from 'max_tokens'; give one.", "max_completion_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_value("Only allowed with 'logprobs': true.", "top_logprobs")
        return self

    def token_limit(self) -> int | None:
        return self.max_tokens or self.max_completion_tokens

    def field_names(self) -> dict[str, str]:
        limit = "max_completion_tokens" if self.max_tokens is None else "max_tokens"
        return {"json_schema": "response_format", "token_ids": "messages", "max_tokens": limit}

    def chat_sampling(self) -> SamplingParams:
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        schema = self.response_format.schema_text() if self.response_format else None
        return self.sampling(logprobs=logprobs, json_schema=schema)


class ChatCompletionRequest(ChatRequest):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[
        list[Message],
        Field(
            min_length=1,
            description="a list of messages with a role (system, developer, user, assistant) "
            "and a content (a string, or a list of text parts)",
        ),
    ]


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions."""

    prompt: Annotated[Prompt, Field(description="a non-empty string or a list of token ids")]
    max_tokens: Annotated[
        TokenCount | None, Field(description=f"an integer from 1; default {COMPLETION_TOKENS}")
    ] = None
    logprobs: Annotated[int | None, Field(ge=0, le=5, description="an integer from 0 to 5")] = None

    def token_limit(self) -> int | None:
        return self.max_tokens or COMPLETION_TOKENS


def parse_chat(body: bytes) -> ChatCompletionRequest:
    """The chat request in `body`; raises as `openai_fields.parse` does."""
    return parse(ChatCompletionRequest, body)


def parse_completion(body: bytes) -> CompletionRequest:
    """The completion request in `body`; raises as `openai_fields.parse` does."""
    return parse(CompletionRequest, body)


def to_process_request(request: ChatCompletionRequest | CompletionRequest) -> ProcessRequest:
    """The request as the processor takes it."""
    if isinstance(request, CompletionRequest):
        return ProcessRequest(
            model=request.model,
            prompt=request.prompt,
            sampling=request.sampling(logprobs=request.logprobs, json_schema=None),
            stop=request.stop or [],
        )
    return ProcessRequest(
        model=request.model,
        messages=[_chat_message(message) for message in request.messages],
        sampling=request.chat_sampling(),
        stop=request.stop or [],
    )


def _chat_message(message: Message) -> ChatMessage:
    return ChatMessage("system" if message.role == "developer" else message.role, message.content)
