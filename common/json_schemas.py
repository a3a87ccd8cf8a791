"""Whether a document is a JSON schema (draft 2020-12), in a time that its size bounds."""

from typing import Any

import jsonschema_rs

MAX_DEPTH = 64

# Offline: also the dialect that a schema names in `$schema` is fetched from nowhere.
_META_SCHEMA = jsonschema_rs.Draft202012Validator(
    {"$ref": "https://json-schema.org/draft/2020-12/schema"}, offline=True
)


def schema_problem(document: Any) -> tuple[str, *tuple[str | int, ...]] | None:
    """What is wrong with it, as a message and the path to the culprit; None: it is a schema.

    What its references lead to may lie where no schema is expected, and is to be asked for apart.
    """
    if depth(document, MAX_DEPTH) > MAX_DEPTH:
        return (f"it is nested more than {MAX_DEPTH} levels deep",)
    try:
        _META_SCHEMA.validate(document)
    except jsonschema_rs.ValidationError as error:
        return error.message[:200], *error.instance_path
    except ValueError as error:  # a text or a number that JSON does not have
        return (str(error)[:200],)
    return None


def depth(document: Any, most: int) -> int:
    """How deep lists and objects are nested; beyond `most` only that it is more."""
    levels = 0
    level = [document] if isinstance(document, dict | list) else []
    while level and levels <= most:
        levels += 1
        children = (
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
        )
        level = [child for child in children if isinstance(child, dict | list)]
    return levels
