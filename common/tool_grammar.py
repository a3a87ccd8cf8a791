"""The JSON schema of the calls that an answer is forced to be."""

from typing import Any

from common.protocol_tools import FunctionTool
from common.tool_schema import nested, tightened

import msgspec

MAX_FORCED_CALLS = 4
"""So many calls at most may come where at least one must, and several may."""


def arguments_schema(tool: FunctionTool) -> str:
    """The schema of one call's arguments."""
    return _text(tightened(tool))


def calls_schema(tools: list[FunctionTool], arguments_key: str, *, most: int | None) -> str:
    """The schema of a call of one of the tools, or of an array of 1 to `most` of them.

    A call is `{"name": ..., arguments_key: {...}}`, in this order.
    """
    definitions = {f"t{number}": tightened(tool) for number, tool in enumerate(tools)}
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.name},
                arguments_key: {"$ref": f"#/$defs/{name}"},
            },
            "required": ["name", arguments_key],
            "additionalProperties": False,
        }
        for name, tool in zip(definitions, tools, strict=True)
    ]
    call = calls[0] if len(calls) == 1 else {"anyOf": calls}
    schema: dict[str, Any] = (
        call if most is None else {"type": "array", "items": call, "minItems": 1, "maxItems": most}
    )
    named = {name: nested(value, f"#/$defs/{name}") for name, value in definitions.items()}
    return _text({**schema, "$defs": named})


def _text(schema: dict[str, Any]) -> str:
    return msgspec.json.encode(schema).decode()
