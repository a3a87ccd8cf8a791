"""How request models check their fields: OpenAI's names for what is wrong.

A field's `description` states the accepted values; it is shown in the OpenAPI docs and ends
every error message about the field.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Self, TypeVar

from common.protocol import PipelineError

import msgspec
from pydantic import BaseModel, ConfigDict, Discriminator, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

Model = TypeVar("Model", bound="StrictModel")


def _document_no_ops(schema: dict[str, Any], model: type["StrictModel"]) -> None:
    schema["additionalProperties"] = False
    for name, values in model.unsupported.items():
        if values:
            about = {"description": "not supported; accepted without effect"}
            schema["properties"][name] = {"enum": [*values, None], **about}


class StrictModel(BaseModel):
    """A JSON object without type coercion and without unknown members.

    A member that is null counts as absent, known or not: clients send back what they received,
    and responses are full of nulls. `unsupported` names the members of OpenAI's API that are
    refused, each with the values that are accepted because they ask for nothing.
    """

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    model_config = ConfigDict(
        strict=True,
        extra="allow",  # only so that `refuse_unknown` sees them
        json_schema_extra=_document_no_ops,
    )

    @model_validator(mode="after")
    def refuse_unknown(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            no_ops = (None, *self.unsupported.get(name, ()))
            # The types too: to Python, True and 1.0 are 1.
            if any(type(value) is type(no_op) and value == no_op for no_op in no_ops):
                continue
            if name in self.unsupported:
                accepted = ", ".join(msgspec.json.encode(no_op).decode() for no_op in no_ops)
                problem = f"not supported by this server. Accepted without effect: {accepted}"
            else:
                problem = "unknown"
            fields = type(self).model_fields.items()
            supported = ", ".join(field.alias or key for key, field in fields)
            raise bad_value(f"The parameter is {problem}. Supported: {supported}.", name)
        return self


TAG = "type="


def by_type(*kinds: str, default: str = "") -> Discriminator:
    """Chooses from a union of objects by their member `type`; each has `Tag(TAG + its type)`."""
    accepted = ", ".join(f"'{kind}'" for kind in kinds)

    def tag(value: Any) -> str | None:
        kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
        kind = default if kind is None else kind
        return TAG + kind if isinstance(kind, str) and kind in kinds else None

    message = f"Unknown or not supported. Supported: {accepted}."
    context: dict[str, Any] = {"message": message, "path": ("type",)}
    return Discriminator(
        tag,
        custom_error_type="bad_value",
        custom_error_message="{message}",
        custom_error_context=context,
    )


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
    tags = {step for step in error["loc"] if isinstance(step, str) and step.startswith(TAG)}
    path = (*(step for step in error["loc"] if step not in tags), *context.get("path", ()))
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
