"""What a JSON schema refers to, and what its parts have in common."""

from collections import Counter
from typing import Any
from urllib.parse import unquote

from common.json_schemas import schema_problem

MAX_REFERENCES = 256


class SchemaError(ValueError):
    """Why a schema cannot be used."""


class References:
    """The `$ref` of one document; only those into itself are known."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._schemas: set[int] = set()  # by id: the document keeps all of them
        self._recursive: dict[str, bool] = {}
        self._within: dict[str, set[str]] = {}

    def target(self, pointer: str) -> Any:
        """The schema at a JSON pointer (RFC 6901) such as `#` or `#/$defs/x`.

        Raises:
            SchemaError: there is none.
        """
        found = self._found(pointer)
        if id(found) not in self._schemas:
            if problem := schema_problem(found):  # below an unknown keyword is anything
                raise SchemaError(f"$ref {pointer!r} points to no schema: {problem[0]}")
            self._schemas.add(id(found))
        return found

    def _found(self, pointer: str) -> Any:
        if pointer != "#" and not pointer.startswith("#/"):
            raise SchemaError(f"$ref {pointer!r} must begin with '#/': nothing is fetched")
        found: Any = self._root
        for part in pointer.split("/")[1:]:
            key = unquote(part).replace("~1", "/").replace("~0", "~")
            try:
                found = found[int(key)] if isinstance(found, list) else found[key]
            except (KeyError, IndexError, ValueError, TypeError):
                raise SchemaError(f"$ref {pointer!r} points to nothing") from None
        return found

    def is_recursive(self, pointer: str) -> bool:
        """Whether the schema there contains itself."""
        if pointer not in self._recursive:
            seen: set[str] = set()
            waiting = [pointer]
            while waiting:
                found = self._references_at(waiting.pop()) - seen
                seen |= found
                waiting += found
            self._recursive[pointer] = pointer in seen
        return self._recursive[pointer]

    def _references_at(self, pointer: str) -> set[str]:
        if pointer not in self._within:
            if len(self._within) == MAX_REFERENCES:
                raise SchemaError(f"there are more than {MAX_REFERENCES} different $ref")
            self._within[pointer] = _references_in(self.target(pointer))
        return self._within[pointer]


def _references_in(schema: Any) -> set[str]:
    found: set[str] = set()
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            if isinstance(part.get("$ref"), str):
                found.add(part["$ref"])
            # What is not a schema may look like one.
            waiting += [value for key, value in part.items() if key not in _DATA]
        elif isinstance(part, list):
            waiting += part
    return found


_DATA = ("const", "enum", "default", "examples")


def property_names(schema: Any, references: References) -> list[str] | None:
    """The properties that a schema and those within it list for one object; None: not one."""
    names: dict[str, None] = {}
    waiting, seen = [schema], set[str]()
    while waiting:
        part = waiting.pop()
        if not isinstance(part, dict):
            continue
        names |= dict.fromkeys([*part.get("properties", {}), *part.get("required", [])])
        for key in ("allOf", "anyOf", "oneOf"):
            waiting += part.get(key, [])
        pointer = part.get("$ref")
        if pointer is not None and pointer not in seen:
            seen.add(pointer)
            waiting.append(references.target(pointer))
    return list(names) or None


def shared_names(schema: dict[str, Any], references: References) -> frozenset[str]:
    """The properties that more than one of the schemas within one lists."""
    keys = ("properties", "required")
    parts = [{key: schema[key] for key in keys if key in schema}, *schema.get("allOf", [])]
    parts += [{key: schema[key]} for key in ("$ref", "anyOf", "oneOf") if key in schema]
    listed = Counter(name for part in parts for name in property_names(part, references) or [])
    return frozenset(name for name, count in listed.items() if count > 1)
