"""The agent's questions to the model: one request to the processor each."""

import asyncio
import time
from collections.abc import AsyncGenerator

from chapter4.processor_client import engine_info
from common.dispatch import dispatch
from common.protocol import (
    ChatMessage,
    PipelineError,
    TextOutput,
    from_wire,
    hop_error,
    to_wire,
)
from common.protocol_agent import ToolProcessRequest
from common.protocol_tools import FunctionTool
from common.waiting import linked_child

import msgspec
from dynamo.runtime import Client, Context

TOKENS_A_CHARACTER = 0.4  # more than English has: rather leave out a turn than be refused


class Model:
    """What the processor can be asked by every run; `processor` is a client of its `process`."""

    def __init__(self, processor: Client, processor_info: Client) -> None:
        self._processor = processor
        self._info = processor_info
        self._context_length: int | None = None

    async def context_length(self) -> int:
        """How many tokens a prompt and its answer may have together.

        Raises:
            PipelineError: the processor does not know, or is not there.
        """
        if self._context_length is None:
            self._context_length = (await engine_info(self._info)).context_length
        return self._context_length

    async def answer(
        self, request: ToolProcessRequest, parent: Context, step: str, deadline: float
    ) -> AsyncGenerator[TextOutput, None]:
        """The items of one answer; it ends early, without the last one, if it is stopped.

        That is when `parent` is stopped, or at the `deadline` (of `time.monotonic`). The `step` is
        a part of the request's id: the router and the engines keep the steps apart.

        Raises:
            PipelineError: the request failed, at any point of the stream.
        """
        wire = to_wire(request)
        failure: PipelineError | None = None
        ended = False
        async with linked_child(parent, f"{parent.id()}-{step}") as context:
            seconds = max(deadline - time.monotonic(), 0.0)
            timer = asyncio.get_running_loop().call_later(seconds, context.stop_generating)
            try:
                async for item in dispatch(
                    lambda: self._processor.round_robin(wire, annotated=False, context=context),
                    context,
                ):
                    output = from_wire(item, TextOutput)
                    if output.error is not None:
                        failure = PipelineError.of(output.error)
                    else:
                        ended |= output.finish_reason is not None
                        yield output
            except Exception as error:
                failure = PipelineError.of(hop_error(error, "processor"))
                failure.__cause__ = error
            finally:
                timer.cancel()
        if context.is_stopped():
            return
        if failure is not None:
            raise failure
        if not ended:
            raise PipelineError("unavailable", "The processor ended the stream too early.")


class TokenEstimate:
    """How many tokens messages have, without asking the processor.

    It does not learn from one prompt to the next: what is cut from a conversation depends on it,
    and a prompt that is cut in another place has another prefix.
    """

    def __init__(self) -> None:
        self._ratio = TOKENS_A_CHARACTER

    def count(self, messages: list[ChatMessage]) -> int:
        return round(sum(map(_characters, messages)) * self._ratio)

    def count_tools(self, tools: list[FunctionTool]) -> int:
        return round(len(msgspec.json.encode(tools)) * self._ratio)

    def too_low(self) -> None:
        """A prompt did not fit."""
        self._ratio *= 1.5


def _characters(message: ChatMessage) -> int:
    calls = sum(32 + len(call.name) + len(call.arguments) for call in message.tool_calls)
    return 16 + len(message.content) + calls
