"""Whatever a tool does, its call ends in time with a result of bounded size."""

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

from chapter4 import run_tool as module
from chapter4.run_tool import run_tool
from chapter4.tool_arguments import MAX_ARGUMENTS, check_schema, parse_arguments
from chapter4.tools import Tool, ToolContext, ToolError
from tests.chapter4.tool_calls import NOBODY, call

import pytest

OBJECT: dict[str, Any] = {"type": "object"}
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def tool(work: Callable[[], Awaitable[Any]], *, timeout_s: float = 60.0) -> Tool:
    async def run(arguments: dict[str, Any], context: ToolContext) -> str:
        return await work()  # type: ignore[no-any-return]

    return Tool("it", "Do it.", OBJECT, run, timeout_s)


class BrokenError(Exception):
    def __str__(self) -> str:
        raise ValueError("not even that")


@pytest.mark.parametrize(
    ("raised", "error"),
    [
        (ToolError("no such city"), "no such city"),
        (ValueError("bad"), "ValueError: bad"),
        (SystemExit(3), "SystemExit: 3"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (GeneratorExit(), "GeneratorExit"),
        (asyncio.CancelledError(), "it cancelled itself"),
        (BaseExceptionGroup("many", [SystemExit()]), "BaseExceptionGroup: many (1 sub-exception)"),
        (RecursionError("deep"), "RecursionError: deep"),
        (MemoryError(), "MemoryError"),
        (BrokenError(), "BrokenError"),
    ],
)
async def test_what_a_tool_raises_is_its_error(raised: BaseException, error: str) -> None:
    async def fail() -> str:
        raise raised

    result = await call(tool(fail))
    assert (result.output, result.error, result.attempts) == ("", error, 1)


@pytest.mark.parametrize("value", [None, 3, b"bytes", ["x"], object()])
async def test_what_is_no_text_is_an_error(value: object) -> None:
    async def give() -> object:
        return value

    result = await call(tool(give))
    assert result.error == f"it returned a {type(value).__name__}, which is no text"


async def test_a_long_output_is_cut_and_says_so() -> None:
    async def much() -> str:
        return "x" * 1_000_000

    result = await run_tool(tool(much), "{}", NOBODY, deadline=time.monotonic() + 60, max_output=10)
    assert result.output == "xxxxxxxxxx\n[cut: 999990 more characters]"


async def test_a_long_error_is_cut() -> None:
    async def fail() -> str:
        raise ToolError("x" * 1_000_000)

    result = await call(tool(fail))
    assert result.error is not None
    assert len(result.error) < 1100


async def test_text_that_utf8_does_not_have_can_be_sent_on() -> None:
    async def odd() -> str:
        return "a\ud800b"

    assert (await call(tool(odd))).output == "a?b"


async def test_a_tool_that_hangs_is_cancelled() -> None:
    cancelled = asyncio.Event()

    async def hang() -> str:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        return ""

    result = await call(tool(hang, timeout_s=0.05))
    assert result.error == "it did not answer within 0.05 s"
    assert result.attempts == 1
    assert cancelled.is_set()


async def test_a_tool_that_ignores_its_cancellation_is_left_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "CANCEL_GRACE_S", 0.05)
    release = asyncio.Event()

    async def stubborn() -> str:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue
        return ""

    result = await call(tool(stubborn, timeout_s=0.05))
    assert result.error == "it did not answer within 0.05 s"
    assert "left behind" in caplog.text
    left = [task for task in asyncio.all_tasks() if task.get_name() == "tool it"]
    assert len(left) == 1
    release.set()
    await asyncio.wait(left)
    assert not module._left_behind


async def test_cancelling_the_call_cancels_the_tool() -> None:
    running, ended = asyncio.Event(), asyncio.Event()

    async def work() -> str:
        running.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return ""

    task = asyncio.create_task(call(tool(work)))
    await running.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


@pytest.mark.parametrize(
    "failure", [ToolError("busy", transient=True), ConnectionResetError(), TimeoutError("slow")]
)
async def test_a_transient_failure_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    monkeypatch.setattr(module, "FIRST_BACKOFF_S", 0.001)
    failures = [failure, failure]

    async def sometimes() -> str:
        if failures:
            raise failures.pop()
        return "done"

    result = await call(tool(sometimes))
    assert (result.output, result.error, result.attempts) == ("done", None, 3)


async def test_retries_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_BACKOFF_S", 0.001)

    async def never() -> str:
        raise ToolError("busy", transient=True)

    result = await call(tool(never))
    assert (result.error, result.attempts) == ("busy", 3)


async def test_there_is_no_retry_after_the_deadline() -> None:
    async def never() -> str:
        raise ToolError("busy", transient=True)

    result = await run_tool(
        tool(never), "{}", NOBODY, deadline=time.monotonic() + 0.09, retries=1000
    )
    assert result.attempts <= 1
    assert result.error in ("busy", "There was no time left for it.")


async def test_without_time_nothing_is_called() -> None:
    async def work() -> str:
        raise AssertionError

    result = await run_tool(tool(work), "{}", NOBODY, deadline=time.monotonic())
    assert (result.error, result.attempts) == ("There was no time left for it.", 0)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", "no JSON object"),
        ("{", "no JSON"),
        ('{"a": NaN}', "NaN is no JSON number"),
        ('{"a": ' + "[" * 20_000 + "]" * 10_000 + "}", "no JSON"),
        ('{"a": ' + "9" * 20_000 + "}", "no JSON"),
        ('"' + "x" * MAX_ARGUMENTS + '"', f"more than {MAX_ARGUMENTS} characters"),
    ],
)
async def test_arguments_that_are_none_are_refused(text: str, reason: str) -> None:
    async def work() -> str:
        raise AssertionError

    result = await run_tool(tool(work), text, NOBODY, deadline=time.monotonic() + 60)
    assert result.error is not None
    assert reason in result.error
    assert len(result.error) < 500


def doubling(depth: int) -> dict[str, Any]:
    """A schema whose check takes 2 ** depth steps."""
    definitions: dict[str, Any] = {
        f"d{number}": {"allOf": [{"$ref": f"#/$defs/d{number + 1}"}] * 2} for number in range(depth)
    }
    return {"type": "object", "$defs": {**definitions, f"d{depth}": {}}, "$ref": "#/$defs/d0"}


# Each level of the arguments takes a hundred references.
CHAIN: dict[str, Any] = {str(link): {"not": {"$ref": f"#/$defs/{link + 1}"}} for link in range(100)}
CHAIN["100"] = {"$ref": "#"}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "$ref": "#"},
        {"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}},
        {"type": "object", "anyOf": [{"$ref": "#"}, {"$ref": "#"}]},
        doubling(40),
        {"type": "object", "properties": {"a": {"$ref": "#/$defs/0"}}, "$defs": CHAIN},
    ],
)
def test_a_check_that_does_not_end_is_ended(schema: dict[str, Any]) -> None:
    check_schema(schema)
    began = time.thread_time()
    with pytest.raises(ValueError, match="check does not end"):
        parse_arguments('{"a": {}}', schema)
    assert time.thread_time() - began < 20


MANY_SMALL = {
    "type": "object",
    "properties": {"a": {"items": {"allOf": [{"maxLength": 9}] * 3000}}},
}
ONE_LARGE = {"type": "object", "properties": {"a": {"uniqueItems": True}}}


@pytest.mark.parametrize("item", [1, [1], {"a": 1}])
@pytest.mark.parametrize("schema", [MANY_SMALL, ONE_LARGE])
def test_a_check_takes_bounded_time(schema: dict[str, Any], item: object) -> None:
    check_schema(schema)
    items = [item] * (30_000 // len(json.dumps(item) + ", "))
    began = time.thread_time()
    with contextlib.suppress(ValueError):
        parse_arguments(json.dumps({"a": items}), schema)
    assert time.thread_time() - began < 10


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "$ref": "#/$defs/none"},
        {"type": "object", "properties": {"a": {"$ref": "#/x"}}, "x": {"properties": 5}},
    ],
)
def test_a_reference_that_leads_nowhere_is_named(schema: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a reference names no schema"):
        parse_arguments('{"a": {}}', schema)


@pytest.mark.parametrize(
    ("schema", "arguments"),
    [
        ({"additionalProperties": False, "patternProperties": {"^(a+)+$": {}}}, {"a": 1}),
        ({"not": {"properties": {"a": {"pattern": "^x"}}}}, {"a": "y"}),
        ({"properties": {"a": {"oneOf": [{"pattern": "x"}, {"pattern": "y"}]}}}, {"a": "y"}),
        ({"unevaluatedProperties": False, "allOf": [{"properties": {"a": {}}}]}, {"a": 1}),
        ({"properties": {"$ref": {"type": "string"}}}, {"$ref": "x"}),
        ({"properties": {"a": {"uniqueItems": True}}}, {"a": [1, True]}),
    ],
)
def test_nothing_is_refused_that_was_not_checked(
    schema: dict[str, Any], arguments: dict[str, Any]
) -> None:
    schema = {"type": "object", **schema}
    check_schema(schema)
    assert parse_arguments(json.dumps(arguments), schema) == arguments


@pytest.mark.parametrize(
    ("schema", "arguments", "reason"),
    [
        ({"allOf": [{"required": ["a"]}], "unevaluatedProperties": False}, {"b": 1}, "required"),
        ({"properties": {"$ref": {"type": "string"}}}, {"$ref": 1}, "not of type"),
        ({"properties": {"a": {"uniqueItems": True}}}, {"a": [[1], [1]]}, "same item twice"),
        ({"properties": {"a": {"multipleOf": 0.5}}}, {"a": 10**400}, "too large"),
        ({"additionalProperties": False}, {"a": 1}, "'a' was unexpected"),
        ({"properties": {"a": {"not": {"type": "string"}}}}, {"a": "x"}, "a: .x. should not"),
    ],
)
def test_arguments_that_do_not_match_are_refused(
    schema: dict[str, Any], arguments: dict[str, Any], reason: str
) -> None:
    schema = {"type": "object", **schema}
    check_schema(schema)
    with pytest.raises(ValueError, match=reason):
        parse_arguments(json.dumps(arguments), schema)


def test_a_pattern_cannot_keep_the_agent_busy() -> None:
    evil = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(a+)+$"}}}
    assert parse_arguments(json.dumps({"a": "a" * 1000 + "!"}), evil)


def test_a_dialect_does_not_end_the_limits() -> None:
    schema = {"$schema": DIALECT, **doubling(40), "properties": {"a": {"$ref": "#"}}}
    check_schema(schema)
    with pytest.raises(ValueError, match="check does not end"):
        parse_arguments('{"a": {}}', schema)
    tree = {
        "$schema": DIALECT,
        "type": "object",
        "properties": {"a": {"$ref": "#"}, "b": {"type": "string", "pattern": "^(a+)+$"}},
    }
    assert parse_arguments(json.dumps({"a": {"b": "a" * 1000 + "!"}}), tree)


def test_a_recursive_schema_can_be_used() -> None:
    tree = {
        "type": "object",
        "properties": {"leaves": {"type": "array", "items": {"$ref": "#"}}},
        "additionalProperties": False,
    }
    check_schema(tree)
    deep = '{"leaves": [' * 20 + '{"leaves": []}' + "]}" * 20
    assert parse_arguments(deep, tree) == json.loads(deep)
    with pytest.raises(ValueError, match=r"leaves\[0\]"):
        parse_arguments('{"leaves": [{"x": 1}]}', tree)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "object", "description": "x" * 100_000}, "more than 65536"),
        (nested(sys.getrecursionlimit()), "is no JSON"),
        (
            {"type": "object", "properties": {"a": {"$ref": "http://x.example/s"}}},
            "another document",
        ),
        ({"type": "object", "properties": {"a": {"$schema": DIALECT}}}, "has a .schema inside"),
        ({"type": "array"}, "is not that of an object"),
        ({}, "is not that of an object"),
        ({"type": "object", "properties": {"a": {"type": "text"}}}, "is no JSON schema"),
        ({"type": "object", "x": {1, 2}}, "is no JSON"),
    ],
)
def test_a_schema_that_cannot_be_checked_is_refused(schema: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_schema(schema)
