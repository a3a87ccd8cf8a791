"""An answer of a form, or calls: what the processor is asked, and what of it is told."""

from collections.abc import AsyncGenerator
from typing import Any

from chapter4.drafted_answer import drafted, needs_draft
from common.protocol import ChatMessage, SamplingParams, TextOutput, Usage
from common.protocol_agent import ToolProcessRequest
from common.protocol_tools import FunctionTool, ToolCallDelta, ToolChoice

import pytest

FORM = '{"type": "object"}'
CALL = [ToolCallDelta(0, "{}", "call_1", "find")]


def question(**fields: Any) -> ToolProcessRequest:
    fields.setdefault("tools", [FunctionTool("find")])
    fields.setdefault("sampling", SamplingParams(json_schema=FORM))
    return ToolProcessRequest(model="m", messages=[ChatMessage("user", "hi")], **fields)


@pytest.mark.parametrize(
    ("fields", "needed"),
    [
        ({}, True),
        ({"tools": []}, False),
        ({"sampling": SamplingParams()}, False),
        ({"tool_choice": ToolChoice("none")}, False),
        ({"tool_choice": ToolChoice("required")}, False),
    ],
)
def test_only_what_no_grammar_can_hold_has_a_draft(fields: dict[str, Any], needed: bool) -> None:
    assert needs_draft(question(**fields)) is needed


async def run(*answers: list[TextOutput]) -> tuple[list[TextOutput], list[ToolProcessRequest]]:
    """What is told, and what was asked."""
    asked: list[ToolProcessRequest] = []
    left = list(answers)

    async def ask(wanted: ToolProcessRequest) -> AsyncGenerator[TextOutput, None]:
        asked.append(wanted)
        for output in left.pop(0):
            yield output

    told = [output async for output in drafted(question(), ask, ask)]
    return told, asked


async def test_calls_are_told_without_the_text_around_them() -> None:
    told, asked = await run(
        [
            TextOutput("I look it up.", tokens=4),
            TextOutput("", tokens=6, tool_calls=CALL),
            TextOutput("", tokens=1, finish_reason="tool_calls", usage=Usage(9, 11)),
        ]
    )
    assert told == [
        TextOutput(tokens=10, tool_calls=CALL),
        TextOutput(tokens=1, finish_reason="tool_calls", usage=Usage(9, 11)),
    ]
    assert [one.sampling.json_schema for one in asked] == [None]


async def test_a_draft_without_calls_is_written_again_in_the_form() -> None:
    told, asked = await run(
        [TextOutput("Hi", tokens=2, finish_reason="stop", usage=Usage(9, 2, 8))],
        [
            TextOutput("{", tokens=1),
            TextOutput("}", tokens=1, finish_reason="stop", usage=Usage(9, 2, 9), worker_id=3),
        ],
    )
    assert told == [
        TextOutput("{", tokens=3),
        TextOutput("}", tokens=1, finish_reason="stop", usage=Usage(9, 4, 8), worker_id=3),
    ]
    assert [one.sampling.json_schema for one in asked] == [None, FORM]
    assert [one.tool_choice.mode for one in asked] == ["auto", "none"]
    assert asked[0].tools == asked[1].tools, "the prompt is the same"


async def test_a_draft_that_was_cancelled_is_not_written_again() -> None:
    cancelled = TextOutput(tokens=1, finish_reason="cancelled", usage=Usage(9, 1))
    told, asked = await run([cancelled])
    assert told == [cancelled]
    assert len(asked) == 1
