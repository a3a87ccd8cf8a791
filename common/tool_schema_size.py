"""How long a JSON document can be that a schema of `tool_schema` allows."""

import json
import math
from typing import Any

from common.tool_schema_types import DECIMALS, FORMAT_LENGTH

_KEY_LENGTH = 32
_NUMBER_LENGTH = 18 + DECIMALS


def longest(schema: Any, definitions: dict[str, Any]) -> float:
    """In characters, without escapes; `math.inf` if nothing bounds it."""
    known: dict[str, float] = {}

    def of(part: Any) -> float:
        if part is False:
            return 0
        if not isinstance(part, dict) or not part:
            return math.inf
        if "enum" in part or "const" in part:
            values = part.get("enum", [part.get("const")])
            return max((len(json.dumps(value)) for value in values), default=0)
        if "$ref" in part:
            name = part["$ref"].removeprefix("#/$defs/")
            if name not in known:
                known[name] = math.inf  # if it contains itself
                known[name] = of(definitions[name])
            return known[name]
        bounds = [of(branch) for branch in part.get("allOf", [])]
        if "anyOf" in part:
            bounds.append(max((of(branch) for branch in part["anyOf"]), default=0))
        if "type" in part:
            types = part["type"] if isinstance(part["type"], list) else [part["type"]]
            bounds.append(max((of_type(name, part) for name in types), default=0))
        return sum(bounds) if bounds else math.inf

    def of_type(name: str, part: dict[str, Any]) -> float:
        if name == "string":
            usual = FORMAT_LENGTH if "format" in part else math.inf
            return 2 + float(part.get("maxLength", usual))
        if name == "array":
            prefix = part.get("prefixItems", [])
            rest = max(part.get("maxItems", math.inf) - len(prefix), 0)
            return 2 + sum(of(item) + 2 for item in prefix) + _times(rest, of(part["items"]) + 2)
        if name == "object":
            total: float = 2
            elsewhere = "allOf" in part or "anyOf" in part
            for key, value in part.get("properties", {}).items():
                if not (elsewhere and value is True):
                    total += len(json.dumps(key)) + 4 + of(value)
            for value in part.get("patternProperties", {}).values():
                count = part.get("maxProperties", math.inf)
                total += _times(count, _KEY_LENGTH + 6 + of(value))
            return total
        return {"boolean": 5, "null": 4}.get(name, _NUMBER_LENGTH)

    return of(schema)


def _times(count: float, length: float) -> float:
    return count * length if count and length else 0
