"""A call's arguments: the model's text, checked by the tool's schema.

Neither is trusted. The schema of an MCP server may be huge, may refer to itself for ever or to
another host, and a pattern in it may take a regular expression hours; so its size and how often
references are followed are bounded. Patterns are not checked here: a function's are by pydantic,
whose regular expressions take linear time, an MCP server's by the server.
"""

import json
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import jsonschema
import referencing
from jsonschema import Draft202012Validator

MAX_ARGUMENTS = 32_768  # characters
MAX_SCHEMA = 65_536  # characters as JSON
MAX_REFERENCES = 10_000  # followed in one check

# The first one's regular expressions; the others follow references without our counting them.
_UNBOUNDED = ("patternProperties", "unevaluatedProperties", "unevaluatedItems")

_left: ContextVar[int] = ContextVar("references left")


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
    _left.set(MAX_REFERENCES)
    try:
        problem = jsonschema.exceptions.best_match(
            _Validator(_without_dialect(schema), registry=_NO_OTHERS).iter_errors(arguments)
        )
    except (RecursionError, referencing.exceptions.Unresolvable, _TooManyError) as error:
        raise ValueError("the tool's schema cannot be used: its references do not end") from error
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
    try:
        Draft202012Validator.check_schema(schema)
    except RecursionError as error:
        raise ValueError(f"is no JSON: {_short(error)}") from error
    except jsonschema.SchemaError as error:
        raise ValueError(f"is no JSON schema: {_short(error.message)}") from error
    if schema.get("type") != "object":
        raise ValueError("is not that of an object")
    for key, value in _keywords(_without_dialect(schema)):
        if key in ("$ref", "$dynamicRef") and not str(value).startswith("#"):
            raise ValueError(f"refers to another document: {_short(value)}")
        if key in _UNBOUNDED:
            raise ValueError(f"has {key}, which are not checked in bounded time")
        if key == "$schema" and isinstance(value, str):
            raise ValueError("has a $schema inside, whose rules would be used instead of ours")


class _TooManyError(Exception):
    """References were followed more often than `MAX_REFERENCES`."""


def _counted(keyword: str) -> Any:
    follow = Draft202012Validator.VALIDATORS[keyword]

    def check(validator: Any, reference: Any, instance: Any, schema: Any) -> Iterator[Any]:
        left = _left.get()
        if left == 0:
            raise _TooManyError
        _left.set(left - 1)
        yield from follow(validator, reference, instance, schema) or ()

    return check


_Validator = jsonschema.validators.extend(
    Draft202012Validator,
    {"pattern": None, "$ref": _counted("$ref"), "$dynamicRef": _counted("$dynamicRef")},
)
_NO_OTHERS: referencing.Registry[Any] = referencing.Registry()  # fetches no other document


def _without_dialect(schema: dict[str, Any]) -> dict[str, Any]:
    """Where it is named, the library takes its own rules for the dialect, not `_Validator`."""
    return {key: value for key, value in schema.items() if key != "$schema"}


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
