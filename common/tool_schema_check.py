"""Whether a tool's schema is one at all."""

import json
from functools import lru_cache

from common.engines.json_schema import MAX_SCHEMA_BYTES, check_schema_numbers
from common.json_schemas import schema_problem
from common.tool_schema_refs import SchemaError


@lru_cache(256)
def check(text: str) -> None:
    """Check a schema's text; an agent asks for the same ones again and again.

    Raises:
        SchemaError: it is too large, or not a JSON schema.
        PipelineError: kind `invalid_request`; see `check_schema_numbers`.
    """
    if len(text.encode()) > MAX_SCHEMA_BYTES:
        raise SchemaError(f"they have more than {MAX_SCHEMA_BYTES} bytes")
    check_schema_numbers(text)
    if problem := schema_problem(json.loads(text)):
        message, *path = problem
        raise SchemaError(f"{'.'.join(map(str, path)) or 'the schema'}: {message}")
