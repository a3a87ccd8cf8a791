"""A chat whose answer has a form and that may call tools: no grammar can hold both.

The model first answers freely, in a draft of which only calls are told. If it calls nothing, it is
asked again, with the grammar of the form and without calls; the prompt is the same, and cached.
"""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from common.protocol import TextOutput
from common.protocol_agent import ToolProcessRequest
from common.protocol_tools import ToolChoice

from msgspec.structs import replace

Ask = Callable[[ToolProcessRequest], AsyncGenerator[TextOutput, None]]


def needs_draft(question: ToolProcessRequest) -> bool:
    free = bool(question.tools) and question.tool_choice.mode == "auto"
    return free and question.sampling.json_schema is not None


async def drafted(
    question: ToolProcessRequest, ask: Ask, ask_again: Ask
) -> AsyncGenerator[TextOutput, None]:
    """The items of the answer: calls, or text of the form.

    Of the usage, the prompt counts once, and the draft's tokens are the answer's, too. `ask` and
    `ask_again` must give all items of an answer, or raise.
    """
    draft = replace(question, sampling=replace(question.sampling, json_schema=None))
    over, untold, last = False, 0, TextOutput()
    async with aclosing(ask(draft)) as outputs:
        async for output in outputs:
            untold += output.tokens
            last = output
            over |= bool(output.tool_calls) or output.finish_reason == "cancelled"
            if output.tool_calls or (over and output.finish_reason is not None):
                yield replace(output, text="", logprobs=None, tokens=untold)
                untold = 0
    if over:
        return
    answer = replace(question, tool_choice=ToolChoice("none"))
    async with aclosing(ask_again(answer)) as outputs:
        async for output in outputs:
            output.tokens, untold = output.tokens + untold, 0
            if output.usage is not None and last.usage is not None:
                spent = output.usage.completion_tokens + last.usage.completion_tokens
                output.usage = replace(last.usage, completion_tokens=spent)
            yield output
