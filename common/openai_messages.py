"""The parts of a chat request that are objects of their own: messages and output formats.

Source: https://platform.openai.com/docs/api-reference/chat/create.
"""

import json
from typing import Annotated, Any, Literal, Self

from common.openai_fields import StrictModel, bad_value
from common.openai_unsupported import MESSAGE_MEMBERS

import msgspec
from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, model_validator


def text_of(content: Any) -> str:
    """A message's content, a string or a list of text parts, as one string."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_value("Content must be a string or a list of text parts.")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise bad_value(f"Only text parts are supported, not {str(kind)[:40]!r}.", index)
        if part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            raise bad_value("A text part has the members 'type' and 'text' (a string).", index)
        texts.append(part["text"])
    return "".join(texts)


def finite(schema: dict[str, Any] | None) -> dict[str, Any] | None:
    try:
        json.dumps(schema, allow_nan=False)
    except ValueError as error:
        raise bad_value("NaN and Infinity are no JSON numbers.") from error
    return schema


class TextPart(StrictModel):
    type: Literal["text"]
    text: str


class Message(StrictModel):
    """One turn. `developer` is a synonym of `system`."""

    unsupported = MESSAGE_MEMBERS
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(text_of, json_schema_input_type=str | list[TextPart])]


class JsonSchema(StrictModel):
    """A schema with labels for the caller; the output always matches, whatever `strict` says.

    Without a schema the output is any JSON object.
    """

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: Annotated[
        dict[str, JsonValue] | None, AfterValidator(finite), Field(alias="schema")
    ] = None
    strict: bool | None = None


class ResponseFormat(StrictModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def check_schema(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise bad_value("Needed with type 'json_schema'.", "json_schema")
        if self.type != "json_schema" and self.json_schema is not None:
            raise bad_value("Only with type 'json_schema'.", "json_schema")
        return self

    def schema_text(self) -> str | None:
        """The JSON schema that the output must match, None for free text."""
        if self.type == "text":
            return None
        schema = self.json_schema.schema_ if self.json_schema else None
        # Not json.dumps, whose escapes make a schema in Chinese three times as long.
        return msgspec.json.encode({"type": "object"} if schema is None else schema).decode()
