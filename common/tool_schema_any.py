"""Values whose type a schema leaves open, and objects whose properties it does."""

from dataclasses import dataclass
from typing import Any

from common.tool_schema_refs import SchemaError
from common.tool_schema_types import bounded_number

_DEPTH = 2
_NAME = r"^[A-Za-z0-9_.\- ]{1,32}$"


@dataclass(frozen=True)
class Limits:
    """What a schema is bounded by where it says nothing."""

    string: int
    items: int


def any_value(limits: Limits, definitions: dict[str, Any], depth: int = _DEPTH) -> dict[str, Any]:
    """Any value that is a quarter as large as the limits, nested so deep."""
    name = f"any{depth}"
    if name not in definitions:
        within = Limits(limits.string // 4, max(limits.items // 4, 1))
        kinds: list[dict[str, Any]] = [
            {"type": "string", "maxLength": within.string},
            {"type": "number", **bounded_number({}, integers=False)},
            {"type": "boolean"},
            {"type": "null"},
        ]
        if depth:
            item = any_value(limits, definitions, depth - 1)
            kinds.append({"type": "array", "items": item, "maxItems": within.items})
            kinds.append({"type": "object", **free_object(item, within, 0, None)})
        definitions[name] = {"anyOf": kinds}
    return {"$ref": f"#/$defs/{name}"}


def free_object(values: Any, limits: Limits, least: int, most: int | None) -> dict[str, Any]:
    """The keywords of an object with names of its own choice.

    Raises:
        SchemaError: more than one property is needed; a grammar cannot tell names apart.
    """
    if least > 1:
        raise SchemaError("'minProperties' above 1 needs 'properties'")
    if values is False:
        return {"additionalProperties": False}
    result = {
        "patternProperties": {_NAME: values},
        "additionalProperties": False,
        "maxProperties": limits.items if most is None else most,
    }
    return {**result, "minProperties": least} if least else result
