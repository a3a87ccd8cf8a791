"""A request's prompt: text or chat messages to token ids."""

import asyncio
from collections.abc import Callable

from common.protocol import PipelineError, ProcessRequest
from common.text import TextModel

INLINE_CHARACTERS = 2048


async def tokenize(
    model: TextModel, request: ProcessRequest, own: Callable[[], list[int]] | None = None
) -> list[int]:
    """The prompt's token ids, after the chat template if the request is a chat.

    With `own`, they are what that returns.
    """
    if request.model != model.name:
        raise PipelineError(
            "model_not_found",
            f"The model '{request.model}' does not exist; '{model.name}' does.",
            "model",
        )
    model.check_token_ids(request.sampling.stop_token_ids, "stop_token_ids")
    model.check_token_ids([token for token, _ in request.sampling.logit_bias], "logit_bias")
    if isinstance(request.prompt, list):
        model.check_token_ids(request.prompt, "prompt")
        return request.prompt

    prompt = request.prompt or ""
    messages = request.messages

    def encode() -> list[int]:
        if own is not None:
            return own()
        return model.encode(prompt if messages is None else model.render_chat(messages))

    # A book takes seconds, and the other streams of this process must not wait for it.
    characters = len(prompt) + sum(len(message.content) + 20 for message in messages or [])
    inline = own is None and characters <= INLINE_CHARACTERS
    return encode() if inline else await asyncio.to_thread(encode)


def check_fits(prompt: list[int], context_length: int) -> None:
    """Refuse here what the engine would: a long prompt would not even fit into a NATS message."""
    if len(prompt) >= context_length:
        raise PipelineError(
            "invalid_request",
            f"the prompt has {len(prompt)} tokens, but the context length is {context_length} "
            "tokens and must also have room for one token of output",
            "token_ids",
            code="context_length_exceeded",
        )
