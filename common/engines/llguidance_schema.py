"""JSON schemas for llguidance inside another engine.

SGLang and vLLM make their grammars with it unless their flags name another backend: xgrammar, which
they prefer, has no `multipleOf`, no `pattern` together with a length, and no `allOf`. (vLLM's
`auto` stays with the backend that its first schema needed.)
"""

import json
import math
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

from common.engines.json_schema import (
    JSON_STYLE,
    check_schema_numbers,
    check_schema_size,
    schema_error,
)

# llguidance recurses once for each; about 1600 are too many for a usual thread's stack.
MAX_DEPTH = 256


def engine_schema(json_schema: str) -> str:
    """A client's schema, with the style of the JSON as llguidance is told it.

    Raises:
        PipelineError: kind `invalid_request`; it is too large, no JSON, or nested too deep.
    """
    check_schema_size(json_schema)
    check_schema_numbers(json_schema)
    schema = json.loads(json_schema)
    if not isinstance(schema, dict):
        return json_schema
    try:
        too_deep = depth(schema) > MAX_DEPTH
    except RecursionError:
        too_deep = True
    if too_deep:
        raise schema_error(f"it nests more than {MAX_DEPTH} deep, what $ref refers to included")
    return json.dumps({**schema, "x-guidance": JSON_STYLE})


def depth(schema: dict[str, Any]) -> float:
    """How deep objects and arrays nest, and what they refer to; no less than llguidance recurses.

    Raises:
        RecursionError: very deep.
    """
    known: dict[str, float] = {}

    def reference(pointer: str) -> float:
        if pointer not in known:
            known[pointer] = math.inf  # if it contains itself
            known[pointer] = _height(_target(schema, pointer), reference)
        return known[pointer]

    result = _height(schema, reference)
    if math.isfinite(result):
        return result
    # Each reference is followed once, in whichever order.
    parts = [schema, *(_target(schema, pointer) for pointer in known)]
    return sum(_height(part, lambda _: 0) for part in parts)


def _height(part: Any, reference: Callable[[str], float]) -> float:
    below = 0.0
    pointer = None
    if isinstance(part, dict):
        pointer, part = part.get("$ref"), part.values()
    elif not isinstance(part, list):
        return 0
    for value in part:
        if isinstance(value, dict | list):
            below = max(below, _height(value, reference))
    if isinstance(pointer, str):
        below = max(below, reference(pointer))
    return below + 1


def _target(schema: Any, pointer: str) -> Any:
    """What is at a JSON pointer (RFC 6901) such as `#/$defs/x`; None: nothing."""
    start, *parts = pointer.split("/")
    if start != "#":
        return None
    for part in parts:
        key = unquote(part).replace("~1", "/").replace("~0", "~")
        try:
            schema = schema[int(key)] if isinstance(schema, list) else schema[key]
        except (LookupError, ValueError, TypeError):
            return None
    return schema
