"""Schemas of tools' arguments as people write them, and as pydantic does, from a seed."""

from random import Random
from typing import Any

from common.protocol_tools import FunctionTool

Schema = dict[str, Any]

_NAMES = (
    *("city", "country", "query", "limit", "offset", "date", "start", "end", "user_id", "email"),
    *("tags", "filters", "items", "unit", "price", "quantity", "title", "body", "priority"),
    *("status", "labels", "address", "location", "options", "mode", "count", "enabled", "note"),
)
_VERBS = ("get", "create", "update", "search", "delete", "list", "send", "convert", "book")
_NOUNS = ("weather", "order", "user", "ticket", "document", "event", "invoice", "message", "file")
_WORDS = ("low", "high", "open", "closed", "metric", "imperial", "json", "csv", "daily", "draft")


def tools_of(
    seed: int, count: int, *, depth: int = 2, recursive: bool = True
) -> list[FunctionTool]:
    """So many tools with different names, whose schemas nest so deep.

    Without `recursive`, no schema contains itself.
    """
    random = Random(seed)
    known = [f"{verb}_{noun}" for verb in _VERBS for noun in _NOUNS]
    names = [f"{known[n % len(known)]}_{n}" for n in random.sample(range(10 * count), count)]
    return [
        FunctionTool(name, _described(name), _Schemas(random).arguments(depth, recursive))
        for name in names
    ]


def _described(name: str) -> str:
    return name.replace("_", " ").capitalize() + "."


class _Schemas:
    """One tool's schema: an object with what it refers to."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._definitions: Schema = {}

    def arguments(self, depth: int, recursive: bool) -> Schema:
        schema = self._object(depth)
        if recursive and self._random.random() < 0.1:
            schema["properties"]["tree"] = {"$ref": "#/$defs/Node"}
            self._definitions["Node"] = {
                "type": "object",
                "properties": {
                    "value": self._scalar(),
                    "children": {"type": "array", "items": {"$ref": "#/$defs/Node"}},
                },
                "required": ["value"],
            }
        if recursive and self._random.random() < 0.05:
            schema["properties"]["again"] = {"anyOf": [{"$ref": "#"}, {"type": "null"}]}
        return {**schema, "$defs": self._definitions} if self._definitions else schema

    def _object(self, depth: int) -> Schema:
        random = self._random
        names = random.sample(_NAMES, random.randint(1, 5 if depth == 2 else 3))
        properties = {name: self._value(depth) for name in names}
        schema: Schema = {"type": "object", "properties": properties}
        if random.random() < 0.8:
            schema["required"] = random.sample(names, random.randint(0, len(names)))
        if random.random() < 0.3:
            schema["additionalProperties"] = random.choice([False, True, {"type": "integer"}])
        if random.random() < 0.1:
            schema["minProperties"] = random.randint(0, len(names))
        return schema

    def _value(self, depth: int) -> Schema:
        random = self._random
        kind = random.random()
        if depth and kind < 0.15:
            return self._object(depth - 1)
        if depth and kind < 0.3:
            return self._array(depth - 1)
        if depth and kind < 0.38:
            return {"anyOf": [self._value(depth - 1), {"type": "null"}], "default": None}
        if depth and kind < 0.44:
            name = f"Part{len(self._definitions)}"
            self._definitions[name] = {}
            self._definitions[name] = self._object(depth - 1)
            reference = {"$ref": f"#/$defs/{name}"}
            described = {"allOf": [reference], "description": "A part."}
            return random.choice([reference, described])
        if depth and kind < 0.48:
            return self._tagged(depth - 1)
        if depth and kind < 0.51:
            return self._combined(depth - 1)
        if kind < 0.54:
            return {"type": "object", **random.choice([{}, {"additionalProperties": True}])}
        if kind < 0.57:
            return {"type": "object", "additionalProperties": self._scalar()}
        if kind < 0.59:
            return {"description": "Anything."}
        return self._scalar()

    def _array(self, depth: int) -> Schema:
        random = self._random
        if random.random() < 0.1:
            return {"type": "array", "prefixItems": [self._scalar(), self._scalar()]}
        schema: Schema = {"type": "array", "items": self._value(depth)}
        if random.random() < 0.4:
            schema["minItems"] = random.randint(0, 2)
        if random.random() < 0.3:
            schema["maxItems"] = random.randint(2, 5)
        if random.random() < 0.1 and schema.get("minItems", 0) < 2:
            schema["uniqueItems"] = True
        return schema

    def _tagged(self, depth: int) -> Schema:
        branches = []
        for tag in self._random.sample(_WORDS, 2):
            branch = self._object(depth)
            branch["properties"] = {"type": {"const": tag}, **branch["properties"]}
            branch["required"] = ["type", *branch.get("required", [])]
            branch.pop("minProperties", None)
            branches.append(branch)
        return {"oneOf": branches, "discriminator": {"propertyName": "type"}}

    def _combined(self, depth: int) -> Schema:
        properties = self._object(depth)["properties"]
        common = {name: properties.pop(name) for name in list(properties)[::2]}
        part = {"type": "object", "properties": common, "required": list(common)}
        return {"allOf": [part, {"type": "object", "properties": properties}]}

    def _scalar(self) -> Schema:
        random = self._random
        return random.choice(
            [
                {"type": "string", "description": "Free text."},
                {"type": "string", "minLength": 1, "maxLength": random.randint(2, 80)},
                {"type": "string", "minLength": 3},
                {"type": "string", "enum": random.sample(_WORDS, 3)},
                {"enum": [1, "one", None]},
                {"const": random.choice(_WORDS)},
                {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
                {"type": "string", "pattern": "^[a-z]+$"},
                {"type": "string", "format": random.choice(["date", "date-time", "email", "uuid"])},
                {"type": "string", "format": random.choice(["uri", "ipv4", "binary", "phone"])},
                {"type": "integer"},
                {"type": "integer", "minimum": 1, "maximum": random.randint(1, 1000)},
                {"type": "integer", "exclusiveMinimum": 0},
                {"type": "integer", "multipleOf": 5},
                {"type": "number"},
                {"type": "number", "minimum": -90, "maximum": 90},
                {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
                {"type": "boolean"},
                {"type": ["string", "null"]},
                {"type": ["integer", "string"], "minimum": 0},
            ]
        )
