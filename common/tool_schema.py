"""JSON schemas of tools' arguments, made fit for a grammar."""

from typing import Any

from common.protocol_tools import FunctionTool


def tightened(tool: FunctionTool) -> dict[str, Any]:
    return tool.parameters or {"type": "object", "properties": {}, "additionalProperties": False}


def nested(schema: Any, place: str) -> Any:
    """The schema as it must be to stand at `place`, a `$ref` such as `#/$defs/x`, in another."""
    if isinstance(schema, list):
        return [nested(part, place) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: place + value[1:]
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else nested(value, place)
        for key, value in schema.items()
    }
