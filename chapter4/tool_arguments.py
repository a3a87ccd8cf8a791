"""A call's arguments: the model's text, checked by the tool's schema.

Neither is trusted. The schema of an MCP server may be huge, may refer to itself for ever or to
another host, and a pattern in it may take a regular expression hours; so sizes and the time of a
check are bounded. What that could not bound is not checked here (`_UNCHECKED`): a function's
patterns are checked by pydantic, whose regular expressions take linear time, an MCP server's by
the server. A schema with such keywords is not asked what must *not* match, so that arguments are
not refused for what nobody looked at.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from common.json_schemas import schema_problem

import jsonschema
import referencing
from jsonschema import Draft202012Validator

MAX_ARGUMENTS = 32_768  # characters
MAX_SCHEMA = 65_536  # characters as JSON
MAX_SECONDS = 0.5  # of CPU, for one check
MAX_DEPTH = 100  # keywords within keywords; where Python's own limit is hit, `rpds` panics

_UNCHECKED = ("pattern", "patternProperties", "unevaluatedProperties", "unevaluatedItems")
_NEGATIVE = ("not", "if", "contains")

_limits: ContextVar["_Limits"] = ContextVar("limits of the check")
_Check = Callable[[Any, Any, Any, Any], Iterator[Any] | None]


def parse_arguments(text: str, schema: dict[str, Any]) -> dict[str, Any]:
    """The object that `text` is.

    Raises:
        ValueError: it is none, or does not match the schema, or the schema is broken: says how.
    """
    if len(text) > MAX_ARGUMENTS:
        raise ValueError(f"the arguments have more than {MAX_ARGUMENTS} characters")
    try:
        arguments = json.loads(text or "{}", parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the arguments are no JSON: {_short(error)}") from error
    if not isinstance(arguments, dict):
        raise ValueError("the arguments are no JSON object")
    # Where it is named, the library takes its own rules for the dialect, not ours.
    schema = {key: value for key, value in schema.items() if key != "$schema"}
    lenient = any(key in _UNCHECKED for key, _ in _keywords(schema))
    validator = (_Lenient if lenient else _Validator)(schema, registry=_NO_OTHERS)
    _limits.set(_Limits(time.thread_time() + MAX_SECONDS))
    try:
        problem = jsonschema.exceptions.best_match(validator.iter_errors(arguments))
    except _EndlessError as error:
        raise ValueError("the tool's schema cannot be used: its check does not end") from error
    except (referencing.exceptions.Unresolvable, AttributeError, TypeError) as error:
        raise ValueError("the tool's schema cannot be used: a reference names no schema") from error
    except OverflowError as error:
        raise ValueError("the arguments have a number that is too large") from error
    if problem is not None:
        where = problem.json_path.removeprefix("$").removeprefix(".")
        raise ValueError(f"{where or 'the arguments'}: {_short(problem.message)}")
    return arguments


def check_schema(schema: dict[str, Any]) -> None:
    """Refuse the schema of a tool that `parse_arguments` could not use.

    Raises:
        ValueError: saying what is wrong with it.
    """
    try:
        size = len(json.dumps(schema))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"is no JSON: {_short(error)}") from error
    if size > MAX_SCHEMA:
        raise ValueError(f"has {size} characters, more than {MAX_SCHEMA}")
    if problem := schema_problem(schema):
        raise ValueError(f"is no JSON schema: {problem[0]}")
    if schema.get("type") != "object":
        raise ValueError("is not that of an object")
    for key, value in _keywords({**schema, "$schema": None}):
        if key in ("$ref", "$dynamicRef") and isinstance(value, str) and value[:1] != "#":
            raise ValueError(f"refers to another document: {_short(value)}")
        if key == "$schema" and isinstance(value, str):
            raise ValueError("has a $schema inside, whose rules would be used instead of ours")


class _EndlessError(Exception):
    """The check takes more than `MAX_SECONDS`, or has come to `MAX_DEPTH`."""


@dataclass
class _Limits:
    until: float  # as of `time.thread_time`
    depth: int = 0


def _limited(check: _Check) -> _Check:
    def checked(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
        limits = _limits.get()
        if limits.depth == MAX_DEPTH or time.thread_time() > limits.until:
            raise _EndlessError
        limits.depth += 1
        try:
            yield from check(validator, value, instance, schema) or ()
        finally:
            limits.depth -= 1

    return checked


def _unchecked(validator: Any, value: Any, instance: Any, schema: Any) -> None:
    pass


def _additional(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
    if "patternProperties" not in schema:
        check = Draft202012Validator.VALIDATORS["additionalProperties"]
        yield from check(validator, value, instance, schema) or ()


def _unique(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
    """As the library's, but not in quadratic time."""
    items = instance if value and isinstance(instance, list) else []
    if len({json.dumps(item, sort_keys=True) for item in items}) < len(items):
        yield jsonschema.ValidationError("has the same item twice")


_CHECKS = {
    **Draft202012Validator.VALIDATORS,
    "additionalProperties": _additional,
    "uniqueItems": _unique,
}
_Validator = jsonschema.validators.extend(
    Draft202012Validator,
    {key: _unchecked if key in _UNCHECKED else _limited(check) for key, check in _CHECKS.items()},
)
_Lenient = jsonschema.validators.extend(
    _Validator, {**dict.fromkeys(_NEGATIVE, _unchecked), "oneOf": _Validator.VALIDATORS["anyOf"]}
)
_NO_OTHERS: referencing.Registry[Any] = referencing.Registry()  # fetches no other document


def _keywords(schema: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(schema, dict):
        for key, value in schema.items():
            yield key, value
            yield from _keywords(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _keywords(value)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _short(problem: object) -> str:
    text = str(problem)
    return text if len(text) <= 300 else f"{text[:300]}…"
