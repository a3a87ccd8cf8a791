"""What a JSON schema may ask for, and how its faults are told."""

import json
import math
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from common.protocol import PipelineError

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MAX_SCHEMA_BYTES = 64 * 1024
_MAX_MESSAGE = 200

# Without free white space a weak model cannot fill its answer with it.
JSON_STYLE: "JsonCompileOptions" = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}

# llguidance computes with 64-bit floats; beyond these integers (RFC 7493, section 2.2) it would
# move a bound, and at -2**63 it crashes.
_MAX_BOUND = 2**53 - 1
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")

# The time and memory to compile a multipleOf grow with it: 10**6 takes seconds and 0.5 GB.
_MAX_MULTIPLE = 100_000


def check_schema_size(json_schema: str) -> None:
    """Raise a `PipelineError`, kind `invalid_request`, for a schema over `MAX_SCHEMA_BYTES`."""
    size = len(json_schema.encode())
    if size > MAX_SCHEMA_BYTES:
        raise schema_error(f"it has {size} bytes; at most {MAX_SCHEMA_BYTES} are accepted")


def check_schema_numbers(json_schema: str) -> None:
    """Refuse numbers that llguidance takes for others or cannot compile in a bounded time.

    Raises:
        PipelineError: kind `invalid_request`, naming the keyword and its limits.
    """
    members: list[tuple[str, Any]] = []
    try:
        # Every object is handed to the hook, so `members` has those of all of them.
        json.loads(json_schema, object_pairs_hook=members.extend)
    except (ValueError, RecursionError) as error:
        raise schema_error(f"it is not valid JSON: {error}") from error
    multiple = 1
    for name, value in members:
        if not isinstance(value, int | float) or not math.isfinite(value):
            continue
        if name in _BOUNDS and abs(value) > _MAX_BOUND:
            raise schema_error(f"{name} is {value}; it must be from {-_MAX_BOUND} to {_MAX_BOUND}")
        if name == "multipleOf" and value != 0:
            multiple = math.lcm(multiple, _coefficient(value))
            if multiple > _MAX_MULTIPLE:
                raise schema_error(
                    f"multipleOf is {value}; the least common multiple of all multipleOf, without "
                    f"decimal point and final zeros, must be from 1 to {_MAX_MULTIPLE}"
                )


def schema_error(reason: str) -> PipelineError:
    """The error for a schema that cannot be used; one line, whatever is in `reason`."""
    # llguidance appends its state and the whole grammar in sections that begin with "<".
    line = " ".join(reason.partition("\n<")[0][: 2 * _MAX_MESSAGE].split())
    printable = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    if len(printable) > _MAX_MESSAGE:
        printable = f"{printable[:_MAX_MESSAGE]}..."
    return PipelineError(
        "invalid_request", f"the JSON schema cannot be used: {printable}", "json_schema"
    )


def _coefficient(value: float) -> int:
    """The significant digits of a number as an integer: 25 for 0.25 and for 2500."""
    return int("".join(map(str, Decimal(str(value)).normalize().as_tuple().digits)))
