"""JSON schemas in requests: which ones a function's arguments may have.

A schema becomes a grammar, part of a prompt, and a check of what the model wrote. So it has a
bounded size, also when its references are followed, and refers to nothing outside itself, for
which a validator might go to the network.
"""

import functools
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from common.json_schemas import depth, schema_problem
from common.openai_fields import bad_value

import msgspec

MAX_SCHEMA_BYTES = 16 * 1024
MAX_SCHEMA_DEPTH = 32
MAX_EXPANDED_SCHEMAS = 2048
"""Schemas within the schema, each reference counting as what it stands for."""

_BY_NAME = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
_PLAIN_VALUES = ("const", "default", "enum", "examples")
_REFUSED = ("$id", "$anchor", "$dynamicAnchor", "$dynamicRef", "$recursiveRef")

_Problem = tuple[str, *tuple[str | int, ...]]


def check_parameters(schema: dict[str, Any]) -> dict[str, Any]:
    """`schema`, the JSON schema of a function's arguments; `{}` means that there are none.

    Raises:
        PydanticCustomError: see `openai_fields.bad_value`.
    """
    try:
        text = json.dumps(schema, allow_nan=False)
    except ValueError as error:
        raise bad_value("NaN and Infinity are no JSON numbers.") from error
    if len(text) > MAX_SCHEMA_BYTES:
        raise bad_value(f"The schema is over the limit of {MAX_SCHEMA_BYTES} bytes.")
    if problem := _problem(text):
        raise bad_value(*problem)
    return schema


@functools.lru_cache(maxsize=256)  # an agent sends the same tools with every step
def _problem(text: str) -> _Problem | None:
    """What is wrong with the schema: a message, and the path to the culprit."""
    schema = json.loads(text)
    if not schema:
        return None
    if schema.get("type") != "object":
        found = msgspec.json.encode(schema.get("type")).decode()
        return f'Arguments are a JSON object: the type must be "object", not {found[:80]}.', "type"
    if depth(schema, MAX_SCHEMA_DEPTH) > MAX_SCHEMA_DEPTH:
        return (f"The schema is nested more than {MAX_SCHEMA_DEPTH} levels deep.",)
    if problem := schema_problem(schema):
        return f"No valid JSON schema: {problem[0]}.", *problem[1:]
    try:
        _Expansion(schema).count(schema, (), 1)
    except ValueError as error:
        return (str(error),)
    return None


class _Expansion:
    """Follows the references of the schema `root`."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        # By id: the document keeps all of them, and one may have many names.
        self._counts: dict[int, int] = {}

    def count(self, schema: Any, within: tuple[int, ...], level: int) -> int:
        """How many schemas `schema` stands for; `within` are the references that led to it.

        Raises:
            ValueError: too many, or a reference that is refused.
        """
        if not isinstance(schema, dict):  # true or false
            return 1
        if level > MAX_SCHEMA_DEPTH:
            raise ValueError(
                f"With its references followed, the schema is nested more than {MAX_SCHEMA_DEPTH} "
                "levels deep."
            )
        total = 1 + sum(self.count(nested, within, level + 1) for nested in _nested(schema))
        for keyword in _REFUSED:
            if keyword in schema:
                raise ValueError(f"'{keyword}' is not supported; '$ref' with '#/...' is.")
        if "$ref" in schema:
            total += self._count_reference(schema["$ref"], within, level + 1)
        if total > MAX_EXPANDED_SCHEMAS:
            raise ValueError(
                f"With its references followed, the schema has more than {MAX_EXPANDED_SCHEMAS} "
                "schemas in it."
            )
        return total

    def _count_reference(self, reference: Any, within: tuple[int, ...], level: int) -> int:
        if not isinstance(reference, str):  # possible where the keyword around it is unknown
            raise ValueError("A '$ref' is text such as '#/$defs/Name'.")
        target = self._target(reference)
        key = id(target)
        if key in within:
            raise ValueError(f"The schema is recursive: '{reference[:80]}' is part of itself.")
        if key not in self._counts:
            if schema_problem(target):  # below an unknown keyword is anything
                raise ValueError(f"'{reference[:80]}' names no schema.")
            self._counts[key] = self.count(target, (*within, key), level)
        return self._counts[key]

    def _target(self, reference: str) -> Any:
        """What `reference`, such as `#/$defs/Place`, stands for."""
        if reference != "#" and not reference.startswith("#/"):
            raise ValueError(f"'{reference[:80]}' is not in the schema; '#/...' would be.")
        node: Any = self._root
        for step in reference.split("/")[1:]:
            name = unquote(step).replace("~1", "/").replace("~0", "~")
            node = node.get(name) if isinstance(node, dict) else None
        return node


def _nested(schema: dict[str, Any]) -> Iterator[Any]:
    """The schemas right within `schema`."""
    for keyword, value in schema.items():
        if keyword in _BY_NAME and isinstance(value, dict):
            yield from value.values()
        elif isinstance(value, dict) and keyword not in _PLAIN_VALUES:
            yield value
        elif isinstance(value, list) and keyword not in _PLAIN_VALUES:
            yield from (item for item in value if isinstance(item, dict))
