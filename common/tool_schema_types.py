"""Bounds of strings, numbers and arrays where a schema has none; see `tool_schema`."""

import math
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

KEYS_OF_TYPE: dict[str, tuple[str, ...]] = {
    "object": (
        *("properties", "required", "additionalProperties", "patternProperties"),
        *("minProperties", "maxProperties"),
    ),
    "array": ("items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "integer": (),
    "boolean": (),
    "null": (),
}
MAX_INTEGER = 2**53 - 1
FORMAT_LENGTH = 64
# Those that llguidance knows; of the others nothing is known that could be kept to.
FORMATS = (
    *("date-time", "date", "time", "duration", "email", "hostname"),
    *("ipv4", "ipv6", "uuid", "uri"),
)
DECIMALS = 6
MAX_DECIMALS = 12
_MAX_PATTERN_LENGTH = 8192
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


def bounded_string(own: dict[str, Any], limit: int) -> dict[str, Any]:
    """The keywords of strings, with a `maxLength` of `limit` if there is none."""
    kept: dict[str, Any] = {
        key: own[key] for key in ("minLength", "maxLength", "pattern") if key in own
    }
    least = own.get("minLength", 0)
    if own.get("format") in FORMATS:
        kept["format"] = own["format"]
        limit = FORMAT_LENGTH
    if "maxLength" in own:
        return kept
    if "pattern" in own:
        # Nothing that the pattern needs is longer than itself with each {n} written out.
        counts = [int(count) for count in re.findall(r"\{(\d{1,6})", own["pattern"])]
        needed = len(own["pattern"]) * math.prod(max(count, 1) for count in counts)
        limit = max(limit, needed)
        if limit > _MAX_PATTERN_LENGTH:
            return kept
    return {**kept, "maxLength": max(limit, least)}


def bounded_number(own: dict[str, Any], *, integers: bool) -> dict[str, Any]:
    """The keywords of numbers, with bounds on both sides, and on the digits after the point."""
    kept = {key: own[key] for key in (*_BOUNDS, "multipleOf") if key in own}
    if "minimum" not in own and "exclusiveMinimum" not in own:
        kept["minimum"] = -MAX_INTEGER
    if "maximum" not in own and "exclusiveMaximum" not in own:
        kept["maximum"] = MAX_INTEGER
    if integers:
        return kept
    low = max(kept.get("minimum", -math.inf), kept.get("exclusiveMinimum", -math.inf))
    high = min(kept.get("maximum", math.inf), kept.get("exclusiveMaximum", math.inf))
    digits = DECIMALS
    # A narrow range, or a bound with many digits, needs more of them.
    if 0 < high - low < 1:
        digits += math.ceil(-math.log10(high - low))
    elif low == high:
        return kept
    if digits > MAX_DECIMALS:
        return kept
    step = Decimal(10) ** -digits
    # llguidance takes a whole number for within a range that ends with it: 0 above 0, up to 0.5.
    kept |= _inclusive(kept, "exclusiveMinimum", "minimum", step, max)
    kept |= _inclusive(kept, "exclusiveMaximum", "maximum", -step, min)
    return kept if "multipleOf" in own else {**kept, "multipleOf": float(step)}


def _inclusive(
    kept: dict[str, Any],
    exclusive: str,
    inclusive: str,
    step: Decimal,
    tighter: Callable[[float, float], float],
) -> dict[str, float]:
    """The bound that is to take the place of an exclusive one, which is no longer kept then."""
    if exclusive not in kept:
        return {}
    bound = float(Decimal(str(kept[exclusive])) + step)
    if bound == kept[exclusive]:
        return {}  # a float has no room for the step
    del kept[exclusive]
    return {inclusive: tighter(kept.get(inclusive, bound), bound)}


def array_sizes(own: dict[str, Any], prefix: int, limit: int) -> dict[str, int]:
    """`minItems` and `maxItems`; `prefix` items have schemas of their own."""
    least = own.get("minItems", 0)
    most = own.get("maxItems", max(limit, least, prefix))
    if own.get("uniqueItems"):
        most = min(most, 1)
    return {"minItems": least, "maxItems": most} if least else {"maxItems": most}
