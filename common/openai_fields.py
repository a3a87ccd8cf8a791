"""How request models check their fields: OpenAI's names for what is wrong.

A field's `description` states the accepted values; it is shown in the OpenAPI docs and ends
every error message about the field.
"""

from typing import Any, Self, TypeVar

from common.protocol import PipelineError

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

UNSUPPORTED = frozenset(
    (
        "annotations",
        "audio",
        "best_of",
        "echo",
        "function_call",
        "functions",
        "metadata",
        "modalities",
        "moderation",
        "name",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "reasoning_effort",
        "refusal",
        "safety_identifier",
        "service_tier",
        "store",
        "suffix",
        "tool_call_id",
        "tool_calls",
        "tool_choice",
        "tools",
        "verbosity",
        "web_search_options",
    )
)
"""Parameters of OpenAI's API that this server knows and refuses."""

Model = TypeVar("Model", bound="StrictModel")


class StrictModel(BaseModel):
    """A JSON object without type coercion and without unknown members.

    A member that is null counts as absent, known or not: clients send back what they received,
    and responses are full of nulls.
    """

    model_config = ConfigDict(
        strict=True,
        extra="allow",  # only so that `refuse_unknown` sees them
        json_schema_extra={"additionalProperties": False},
    )

    @model_validator(mode="after")
    def refuse_unknown(self) -> Self:
        for unknown, value in (self.model_extra or {}).items():
            if value is None:
                continue
            problem = "not supported by this server" if unknown in UNSUPPORTED else "unknown"
            fields = type(self).model_fields.items()
            supported = ", ".join(field.alias or name for name, field in fields)
            raise bad_value(f"The parameter is {problem}. Supported: {supported}.", unknown)
        return self


def bad_value(message: str, *path: str | int) -> PydanticCustomError:
    """The error to raise in a validator; `path` leads from the validated value to the culprit."""
    # The message is a format string to pydantic, so it travels as an argument.
    return PydanticCustomError("bad_value", "{message}", {"message": message, "path": path})


def parse(model: type[Model], body: bytes) -> Model:
    """The request in the JSON text `body`.

    Raises:
        PipelineError: kind `invalid_request`; the message names the field at fault and the
            accepted values, `param` is its path, such as `messages[0].content`.
    """
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        details = error.errors(include_url=False)[0]
        raise _invalid_request(model, details) from error


def _invalid_request(model: type[BaseModel], error: ErrorDetails) -> PipelineError:
    context = error.get("ctx", {})
    if error["type"] == "json_invalid":
        reason = context.get("error", error["msg"])
        return PipelineError("invalid_request", f"The body is not valid JSON: {reason}.")
    path = (*error["loc"], *context.get("path", ()))
    if not path:
        message = "The body must be a JSON object."
        return PipelineError("invalid_request", context.get("message", message))
    param = _param(path)
    if error["type"] == "missing":
        return PipelineError("invalid_request", f"Missing required parameter '{param}'.", param)
    problem = context.get("message")
    if problem is None:  # messages about lengths have the length that was given
        got = "" if "actual_length" in context else f", not {_short(repr(error['input']))}"
        problem = f"{error['msg']}{got}."
    field = model.model_fields.get(str(path[0]))
    accepted = f" Accepted: {field.description}." if field and field.description else ""
    return PipelineError("invalid_request", f"'{param}': {problem}{accepted}", param)


def _param(path: tuple[str | int, ...]) -> str:
    """`("messages", 0, "content")` as `messages[0].content`."""
    steps = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in path]
    param = "".join(steps).lstrip(".").removesuffix(".[key]")
    return _short("".join(c if c.isprintable() else "\ufffd" for c in param))


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def request_body_docs(model: type[StrictModel]) -> dict[str, Any]:
    """A FastAPI route's `openapi_extra` for a body that the route parses itself."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def inline(node: Any) -> Any:
        # References are relative to the whole OpenAPI document, where `$defs` is not.
        if isinstance(node, dict):
            if "$ref" in node:
                name = node["$ref"].removeprefix("#/$defs/")
                node = {**definitions[name], **{k: v for k, v in node.items() if k != "$ref"}}
            return {key: inline(value) for key, value in node.items()}
        return [inline(item) for item in node] if isinstance(node, list) else node

    content = {"application/json": {"schema": inline(schema)}}
    return {"requestBody": {"required": True, "content": content}}
