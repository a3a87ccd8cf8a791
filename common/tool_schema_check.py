"""Whether a tool's schema is one at all."""

import json
from functools import lru_cache

from common.engines.json_schema import MAX_SCHEMA_BYTES, check_schema_numbers
from common.tool_schema_refs import SchemaError

import jsonschema
from jsonschema.validators import (
    Draft202012Validator,
    validator_for,
)


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
    schema = json.loads(text)
    try:
        validator_for(schema, Draft202012Validator).check_schema(schema)
    except jsonschema.SchemaError as error:
        raise SchemaError(f"{error.json_path}: {error.message[:200]}") from error
