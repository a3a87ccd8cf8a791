"""Functions as tools: their schemas, and what comes out of a call."""

import threading
from typing import Annotated, Any, Literal

from chapter4.tools import Tool, ToolContext, ToolError, function_tool
from tests.chapter4.tool_calls import NOBODY, call

import pytest
from pydantic import BaseModel, Field


class Place(BaseModel):
    name: str
    zoom: int = 3


def everything(
    city: Annotated[str, Field(description="its name", max_length=40)],
    json: Literal["short", "long"] = "short",
    places: list[Place] = [],  # noqa: B006
    limit: int | None = None,
    *,
    context: ToolContext,
) -> dict[str, Any]:
    """Say what came.

    In several lines.
    """
    return {
        "city": city,
        "json": json,
        "places": [place.zoom for place in places],
        "limit": limit,
        "user": context.user,
    }


def test_the_schema_is_that_of_the_signature() -> None:
    tool = function_tool(everything)
    assert tool.name == "everything"
    assert tool.description == "Say what came.\n\nIn several lines."
    assert tool.parameters == {
        "$defs": {
            "Place": {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "zoom": {"type": "integer", "default": 3},
                },
                "required": ["name"],
                "additionalProperties": False,
            }
        },
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "its name", "maxLength": 40},
            "json": {"type": "string", "enum": ["short", "long"], "default": "short"},
            "places": {"type": "array", "items": {"$ref": "#/$defs/Place"}, "default": []},
            "limit": {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None},
        },
        "required": ["city"],
        "additionalProperties": False,
    }


async def test_a_function_gets_typed_values_and_the_context() -> None:
    tool = function_tool(everything)
    given = {"city": "Quillport", "places": [{"name": "harbour"}, {"name": "x", "zoom": 7}]}
    assert await tool.call(given, ToolContext("ann", "s1")) == (
        '{"city":"Quillport","json":"short","places":[3,7],"limit":null,"user":"ann"}'
    )


async def test_a_function_may_be_async_and_have_no_arguments() -> None:
    async def answer() -> str:
        """Answer."""
        return "42"

    tool = function_tool(answer, name="the_answer", timeout_s=3)
    assert (tool.name, tool.timeout_s) == ("the_answer", 3)
    assert tool.parameters == {"type": "object", "properties": {}, "additionalProperties": False}
    assert await tool.call({}, NOBODY) == "42"


def test_what_cannot_be_a_tool_is_refused_when_it_is_made() -> None:
    def untyped(x) -> None:  # type: ignore[no-untyped-def]
        """Do."""

    def undocumented(x: int) -> None: ...

    def star(*x: int) -> None:
        """Do."""

    def odd(x: threading.Thread) -> None:
        """Do."""

    for function, reason in (
        (untyped, "parameter x of the tool untyped needs a type"),
        (undocumented, "needs a docstring"),
        (star, "needs a name"),
        (odd, "Thread"),
    ):
        with pytest.raises(TypeError, match=reason):
            function_tool(function)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, "'city' is a required property"),
        ({"city": 1}, "city: 1 is not of type 'string'"),
        ({"city": "x" * 41}, "city:"),
        ({"city": "x", "json": "huge"}, "json: 'huge' is not one of"),
        ({"city": "x", "extra": 1}, "'extra' was unexpected"),
        ({"city": "x", "context": {"user": "root"}}, "'context' was unexpected"),
        ({"city": "x", "places": [{"zoom": 1}]}, "places[0]: 'name' is a required property"),
        ({"city": "x", "places": [{"name": "x", "y": 1}]}, "places[0]:"),
    ],
)
async def test_arguments_that_do_not_match_do_not_reach_the_function(
    arguments: dict[str, Any], reason: str
) -> None:
    result = await call(function_tool(everything), **arguments)
    assert result.error is not None
    assert reason in result.error
    assert result.attempts == 0


async def test_a_value_that_is_no_text_is_an_error() -> None:
    def thread() -> Any:
        """Return no text."""
        return threading.current_thread()

    result = await call(function_tool(thread))
    assert result.error == "it returned a Thread, which is no text"


async def test_stuck_calls_do_not_take_all_threads() -> None:
    """A function that hangs in its thread cannot be killed; so only a few may."""
    release = threading.Event()

    def stuck(wait: bool) -> str:
        """Hang."""
        if wait:
            release.wait()
        return "done"

    tool = function_tool(stuck, timeout_s=0.05)
    try:
        for _ in range(8):
            assert (await call(tool, wait=True)).error is not None
        result = await call(tool, wait=False)
        assert result.error == "8 calls of it have not returned yet"
    finally:
        release.set()
    while (await call(tool, wait=False)).error is not None:
        pass  # until the threads have noticed; a busy call waits before it is tried again


def test_a_tool_is_a_value() -> None:
    assert isinstance(function_tool(everything), Tool)
    assert not ToolError("x").transient
    assert ToolError("x", transient=True).transient
