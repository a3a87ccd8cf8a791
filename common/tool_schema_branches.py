"""Whether the branches of a `oneOf` exclude each other."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain, combinations, product
from typing import Any

from common.tool_schema_refs import References, SchemaError

MAX_COMPARISONS = 20_000  # of all branches of one tool; some milliseconds


@dataclass(frozen=True, slots=True)
class _Kind:
    """What matches a schema: nothing, or values of these types, or of these; empty: not known."""

    nothing: bool = False
    types: frozenset[str] = frozenset()
    values: frozenset[str] = frozenset()
    required: dict[str, "_Kind"] = field(default_factory=dict)  # of an object


class Branches:
    """Compares the branches within one document.

    Looks at types and constants, and at those of properties that objects must have.
    """

    def __init__(self, references: References) -> None:
        self._references = references
        # By id: the document keeps all of them.
        self._kinds: dict[tuple[int, bool], _Kind] = {}
        self._exclusive: dict[int, bool] = {}
        self._compared = 0

    def exclude_each_other(self, branches: list[Any]) -> bool:
        """Whether nothing can match two of them, as far as can be seen.

        Raises:
            SchemaError: they are too many.
        """
        if id(branches) not in self._exclusive:
            kinds = [self._kind(branch, of_object=True) for branch in branches]
            exclusive = all(self._disjoint(a, b) for a, b in _pairs(kinds))
            self._exclusive[id(branches)] = exclusive
        return self._exclusive[id(branches)]

    def _kind(self, schema: Any, *, of_object: bool) -> _Kind:
        key = id(schema), of_object
        if key not in self._kinds:
            self._kinds[key] = self._seen(self._resolved(schema), of_object)
        return self._kinds[key]

    def _seen(self, schema: Any, of_object: bool) -> _Kind:
        if not isinstance(schema, dict):
            return _Kind(nothing=schema is False)
        types, required = _types(schema), {}
        if of_object and types == {"object"}:
            properties = schema.get("properties", {})
            for name in schema.get("required", []):
                if name in properties:
                    required[name] = self._kind(properties[name], of_object=False)
        return _Kind(types=types, values=_values(schema), required=required)

    def _resolved(self, schema: Any) -> Any:
        for _ in range(16):
            if not isinstance(schema, dict) or set(schema) != {"$ref"}:
                break
            schema = self._references.target(schema["$ref"])
        return schema

    def _disjoint(self, a: _Kind, b: _Kind) -> bool:
        self._compared += 1
        if self._compared > MAX_COMPARISONS:
            raise SchemaError("the branches of 'oneOf' are too many to compare")
        if a.nothing or b.nothing:
            return True
        if a.types and b.types and not a.types & b.types:
            return True
        if a.values and b.values and not a.values & b.values:
            return True
        both = a.required.keys() & b.required.keys()
        return any(self._disjoint(a.required[name], b.required[name]) for name in both)


def _pairs(kinds: list[_Kind]) -> Iterable[tuple[_Kind, _Kind]]:
    """Those to compare: constants, which may be many, need not be if each is there once."""
    constants = [kind for kind in kinds if kind.values]
    others = [kind for kind in kinds if not kind.values]
    count = sum(len(kind.values) for kind in constants)
    if count > len(frozenset[str]().union(*(kind.values for kind in constants))):
        return combinations(kinds, 2)
    return chain(combinations(others, 2), product(others, constants))


def _types(schema: dict[str, Any]) -> frozenset[str]:
    types = schema.get("type", [])
    listed = types if isinstance(types, list) else [types]
    return frozenset("number" if name == "integer" else name for name in listed)


def _values(schema: dict[str, Any]) -> frozenset[str]:
    values = [schema["const"]] if "const" in schema else schema.get("enum", [])
    # 1 and 1.0 are one value.
    alike = (json.loads(json.dumps(value), parse_int=float) for value in values)
    return frozenset(json.dumps(value, sort_keys=True) for value in alike)
