"""The JSON schema of the calls that an answer is forced to be.

Where a tool's schema leaves open how long something may be, it is bounded by the loosest of
`LIMITS` with which the calls fit into the tokens that there are, a token taken for a character. If
they fit with none, the tightest is taken, and the answer may be cut off. An answer of several calls
has room for two at least, if it can be had.
"""

from typing import Any

from common.engines.json_schema import MAX_SCHEMA_BYTES
from common.protocol import PipelineError
from common.protocol_tools import FunctionTool
from common.tool_schema import tightened
from common.tool_schema_any import Limits
from common.tool_schema_size import longest

import msgspec

MAX_FORCED_CALLS = 4
"""So many calls at most may come where at least one must, and several may."""

LIMITS = (Limits(2048, 16), Limits(512, 8), Limits(128, 6), Limits(32, 4), Limits(16, 2))


def arguments_schema(tool: FunctionTool, tokens: int) -> str:
    """The schema of one call's arguments, which are to fit into so many tokens.

    Raises:
        PipelineError: kind `invalid_request`; see `tightened`, or it is too large.
    """
    for limits in LIMITS:
        definitions: dict[str, Any] = {}
        schema = tightened(tool, limits, definitions, "t0")
        text = _text(schema, definitions)
        if longest(schema, definitions) <= tokens:
            break
    return text


def calls_schema(
    tools: list[FunctionTool], arguments_key: str, tokens: int, *, most: int | None
) -> str:
    """The schema of a call of one of the tools, or of an array of 1 to `most` of them.

    A call is `{"name": ..., arguments_key: {...}}`, in this order. Raises as `arguments_schema`.
    """
    for limits in LIMITS:
        definitions: dict[str, Any] = {}
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool.name},
                    arguments_key: tightened(tool, limits, definitions, f"t{number}"),
                },
                "required": ["name", arguments_key],
                "additionalProperties": False,
            }
            for number, tool in enumerate(tools)
        ]
        call = calls[0] if len(calls) == 1 else {"anyOf": calls}
        _text(call, definitions)  # refused at once if it is too large
        length = longest(call, definitions) + 2
        if length * min(most or 1, 2) + 2 <= tokens:
            break
    if most is None:
        return _text(call, definitions)
    count = max(min(most, int(tokens // length)), 1)
    array = {"type": "array", "items": call, "minItems": 1, "maxItems": count}
    return _text(array, definitions)


def _text(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    whole = {**schema, "$defs": definitions} if definitions else schema
    text = msgspec.json.encode(whole)
    if len(text) > MAX_SCHEMA_BYTES:
        message = f"The tools' parameters come to a schema of {len(text)} bytes; a call can be "
        message += f"forced with at most {MAX_SCHEMA_BYTES}."
        raise PipelineError("invalid_request", message, "tools")
    return text.decode()
