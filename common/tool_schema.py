"""Schemas of tools' arguments as a grammar needs them: bounded, and without references outwards.

What matches the tightened schema matches the tool's own; the other way round it need not be. A
small model that is held to a schema goes on for as long as that lets it, so where the tool says
nothing of its own:

- A string has at most `Limits.string` characters, or what its pattern may need; one with a format
  has 64. Formats that engines do not know are left out: to JSON Schema they are remarks.
- Integers, and numbers before the point, have at most 16 digits; after it they have 6.
- An array has at most `Limits.items` items. `uniqueItems` makes that one.
- An object has the properties that are listed, and no others. Where none are, it has at most
  `Limits.items`, with names of 1 to 32 letters, digits, `_`, `.`, `-` and blanks.
- A value of any type is one of those, nested two deep.
- A schema that contains itself does so `MAX_DEPTH` deep.

Objects below `allOf`, and beside `anyOf` or `oneOf`, are closed together; what several of them say
about one property is left open. Branches of `oneOf` must exclude each other by type or by a
constant, and become those of an `anyOf`: llguidance sees that of few. What no grammar can do
(`_REFUSED`) is refused.
"""

from typing import Any

from common.protocol import PipelineError
from common.protocol_tools import FunctionTool
from common.tool_schema_any import Limits, any_value, free_object
from common.tool_schema_branches import Branches
from common.tool_schema_check import check
from common.tool_schema_refs import (
    References,
    SchemaError,
    property_names,
    shared_names,
)
from common.tool_schema_types import KEYS_OF_TYPE, array_sizes, bounded_number, bounded_string

import msgspec

Schema = dict[str, Any]
# Of objects that get no end of their own: the properties whose values get none either, or all.
Open = frozenset[str] | bool

MAX_DEPTH = 4
MAX_SCHEMAS = 5_000  # with what is within them, and again for each depth
_REFUSED = (
    *("not", "if", "then", "else", "contains", "propertyNames", "dependencies"),
    *("dependentRequired", "dependentSchemas", "unevaluatedItems", "unevaluatedProperties"),
    *("$dynamicRef", "$recursiveRef", "$id"),
)
_VALUE_KEYS = ("enum", "const", "type")
_APPLIED = ("$ref", "allOf", "anyOf", "oneOf")


def tightened(tool: FunctionTool, limits: Limits, definitions: dict[str, Any], name: str) -> Schema:
    """The schema of the tool's arguments; what it refers to is added to `definitions`.

    Those are to be the `$defs` of the schema that it becomes part of, and have names that begin
    with `name`.

    Raises:
        PipelineError: kind `invalid_request`, naming the tool; its schema is too large, wrong, or
            asks for what no grammar can do.
    """
    own = tool.parameters or {"properties": {}}
    try:
        check(msgspec.json.encode(own).decode())
        own = {key: value for key, value in own.items() if key not in ("$id", "$schema")}
        if not any(key in own for key in _APPLIED):
            own["type"] = "object"
        result: Schema = _Walk(own, limits, definitions, name).schema(own, 0)
        return result
    except (SchemaError, RecursionError) as error:
        reason = "they are nested too deep" if isinstance(error, RecursionError) else str(error)
    except PipelineError as error:
        reason = error.info.message
    message = f"A call of the tool '{tool.name}' cannot be forced by its parameters: {reason}"
    raise PipelineError("invalid_request", message, "tools")


class _Walk:
    """Walks one tool's schema; `depth` is how often a schema contained itself on the way."""

    def __init__(self, root: Schema, limits: Limits, definitions: Schema, name: str) -> None:
        self._references = References(root)
        self._siblings = Branches(self._references)
        self._limits = limits
        self._definitions = definitions
        self._name = name
        self._known: dict[tuple[str, int, Open], str] = {}
        self._count = 0

    def schema(self, schema: Any, depth: int, *, open_: Open = False) -> Any:
        """The schema, tightened; objects that are `open_` get no end."""
        self._count += 1
        if self._count > MAX_SCHEMAS:
            raise SchemaError(f"they come to more than {MAX_SCHEMAS} schemas")
        if schema is False:
            return False
        if schema is True:
            return True if open_ is not False else any_value(self._limits, self._definitions)
        if not isinstance(schema, dict):
            raise SchemaError("a schema must be an object or a boolean")
        if refused := [key for key in _REFUSED if key in schema]:
            raise SchemaError(f"'{refused[0]}' is not supported")
        applied = [key for key in _APPLIED if key in schema]
        own = {key: schema[key] for keys in KEYS_OF_TYPE.values() for key in keys if key in schema}
        if "enum" in schema or "const" in schema:
            if any(key in own for key in (*KEYS_OF_TYPE["object"], *KEYS_OF_TYPE["array"])):
                raise SchemaError("'enum' or 'const' beside keywords of objects or arrays")
            own.pop("format", None)
            own |= {key: schema[key] for key in _VALUE_KEYS if key in schema}
            if not applied:
                return own
        if applied:
            return self._applied(schema, applied, own, depth, open_)
        types = schema.get("type")
        if types is None:
            types = [name for name, keys in KEYS_OF_TYPE.items() if any(k in own for k in keys)]
            if not types:
                return {} if open_ is not False else any_value(self._limits, self._definitions)
            types = types[0]
        result: Schema = {"type": types}
        for name in types if isinstance(types, list) else [types]:
            if name not in KEYS_OF_TYPE:
                raise SchemaError(f"there is no type {name!r}")
            if name == "object":
                result |= self._object(own, depth, open_)
            elif name == "array":
                result |= self._array(own, depth, open_)
            elif name == "string":
                result |= bounded_string(own, self._limits.string)
            elif name in ("number", "integer"):
                result |= bounded_number(own, integers="number" not in types)
        return result

    def _applied(
        self, schema: Schema, applied: list[str], own: Schema, depth: int, open_: Open
    ) -> Any:
        """Schemas within a schema that are about the same value."""
        own |= {"type": schema["type"]} if "type" in schema else {}
        if len(applied) == 1 and not own:
            [key] = applied
            if key == "$ref":
                return self._reference(schema[key], depth, open_)
            if key == "allOf" and len(schema[key]) == 1:
                return self.schema(schema[key][0], depth, open_=open_)
            if key != "allOf":
                return {"anyOf": self._branches(key, schema[key], depth, open_)}
        shared = open_ is True or shared_names(schema, self._references) | (open_ or frozenset())
        result: Schema = self.schema(own, depth, open_=shared) if own else {}
        both = []
        if "$ref" in schema:
            both.append(self._reference(schema["$ref"], depth, shared))
        if "allOf" in schema:
            both += [self.schema(part, depth, open_=shared) for part in schema["allOf"]]
        branches = [
            {"anyOf": self._branches(key, schema[key], depth, shared)}
            for key in ("anyOf", "oneOf")
            if key in schema
        ]
        if len(branches) == 1:
            result |= branches[0]
        else:
            both += branches
        if both:
            result["allOf"] = both
        if open_ is False and (names := property_names(schema, self._references)) is not None:
            known = result.get("properties", {})
            result["properties"] = known | {name: True for name in names if name not in known}
            result["additionalProperties"] = False
        return result

    def _branches(self, key: str, branches: list[Any], depth: int, open_: Open) -> list[Any]:
        if key == "oneOf" and not self._siblings.exclude_each_other(branches):
            raise SchemaError("the branches of 'oneOf' must exclude each other by a property")
        return [self.schema(branch, depth, open_=open_) for branch in branches]

    def _reference(self, pointer: Any, depth: int, open_: Open) -> Any:
        target = self._references.target(pointer)
        if self._references.is_recursive(pointer):
            depth += 1
            if depth > MAX_DEPTH:
                return False
        name = self._known.get((pointer, depth, open_))
        if name is None:
            name = self._known[pointer, depth, open_] = f"{self._name}.{len(self._known)}"
            self._definitions[name] = True  # keeps its place
            self._definitions[name] = self.schema(target, depth, open_=open_)
        return {"$ref": f"#/$defs/{name}"}

    def _object(self, own: Schema, depth: int, open_: Open) -> Schema:
        properties = {
            name: self.schema(value, depth, open_=_of_property(open_, name))
            for name, value in own.get("properties", {}).items()
        }
        patterns = {
            pattern: self.schema(value, depth, open_=open_ is not False)
            for pattern, value in own.get("patternProperties", {}).items()
        }
        required = list(own.get("required", []))
        others = own.get("additionalProperties", True)
        least, most = own.get("minProperties", 0), own.get("maxProperties")
        nothing = not (properties or required or patterns)
        if open_ is False and nothing and not ("properties" in own and others is True):
            return free_object(self.schema(others, depth), self._limits, least, most)
        if open_ is False and not patterns:
            properties |= {
                name: self.schema(others, depth) for name in required if name not in properties
            }
        # How many there are is settled by which ones there are.
        missing = max(least - len(required), 0)
        required += [name for name in properties if name not in required][:missing]
        if most is not None:
            optional = [name for name in properties if name not in required]
            for name in optional[max(most - len(required), 0) :]:
                properties[name] = False
        beyond = most is not None and (len(required) > most or open_ is not False or patterns)
        if len(required) < least or beyond:
            raise SchemaError("'minProperties' or 'maxProperties' does not go with the rest")
        kept: Schema = {"properties": properties, "patternProperties": patterns}
        kept = {key: value for key, value in {**kept, "required": required}.items() if value}
        if open_ is False:
            return {**kept, "additionalProperties": False}
        if "additionalProperties" in own:
            kept["additionalProperties"] = self.schema(others, depth, open_=True)
        return kept

    def _array(self, own: Schema, depth: int, open_: Open) -> Schema:
        prefix, items = own.get("prefixItems", []), own.get("items", True)
        if isinstance(items, list):  # as it was until draft 2019-09
            prefix, items = items, own.get("additionalItems", True)
        sizes = array_sizes(own, len(prefix), self._limits.items)
        if prefix and "items" not in own and own.get("minItems", 0) <= len(prefix):
            items = False
        return {
            **({"prefixItems": [self.schema(part, depth) for part in prefix]} if prefix else {}),
            "items": self.schema(items, depth, open_=open_ is True),
            **sizes,
        }


def _of_property(open_: Open, name: str) -> bool:
    return open_ if isinstance(open_, bool) else name in open_
