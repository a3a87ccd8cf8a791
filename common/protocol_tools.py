"""Tools in messages between components: what a model may call, and its calls.

The names and meanings are OpenAI's: https://platform.openai.com/docs/guides/function-calling.
"""

from typing import Any, Literal

import msgspec


class FunctionTool(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """A function that the model may call; `parameters` is the JSON schema of its arguments.

    Without `parameters` it has none.
    """

    name: str
    description: str = ""
    parameters: dict[str, Any] | None = None


class ToolChoice(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """Whether the model may call, must call (`required`), or must call `name` (`required`, too).

    `server` is the set of an agent's tools that `name` is meant to be of.
    """

    mode: Literal["auto", "none", "required"] = "auto"
    name: str | None = None
    server: str | None = None


class ToolCall(msgspec.Struct):
    """One call; `arguments` is the text of a JSON object."""

    id: str
    name: str
    arguments: str


class ToolCallDelta(msgspec.Struct, omit_defaults=True):
    """A piece of the call number `index` of an answer: its first has `id` and `name`."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None
