"""Calls of a model's own will over the whole pipeline; its words are those of a script."""

import json
import sys
import uuid
from collections.abc import AsyncIterator
from typing import Any

from launch.chapters import Options
from launch.children import Children
from launch.pipeline import pipeline
from launch.ports import free_port
from tests.chapter1.helpers import MODEL

import openai
import pytest
import pytest_asyncio

TOOL: Any = {
    "type": "function",
    "function": {
        "name": "find",
        "parameters": {"type": "object", "properties": {"what": {"type": "string"}}},
    },
}
CALL = '<tool_call>\n{"name": "find", "arguments": {"what": "%s"}}\n</tool_call>'
ANSWERS = {
    "both": f"Two.\n{CALL % 'a'}\n{CALL % 'b'}",
    "unknown": CALL.replace("find", "rm") % "a",
    "code": f"```\n{CALL % 'a'}\n```",
    "stop": f"One, STOP, two. {CALL % 'a'}",
    "cut": CALL % ("a" * 200),
}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def url(
    servers: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[str]:
    script = tmp_path_factory.mktemp("script") / "script.json"
    script.write_text(json.dumps([(f"Say {name}", text) for name, text in ANSWERS.items()]))
    lines: list[str] = []
    with Children(lambda name, line: lines.append(f"{name:>10} | {line}")) as children:
        name = f"test-{uuid.uuid4().hex[:12]}"
        options = Options(namespace=name, engines=1, backend="simulated", port=free_port())
        async with pipeline(children, servers, "chapter4", options, start=()) as running:
            running.commands["engine0"] = [
                *(sys.executable, "-m", "tests.chapter4.scripted_engine"),
                *running.commands["engine0"][3:],
                f"--engine-arg={script}",
            ]
            for component in running.commands:
                running.start(component)
            await running.wait_ready()
            yield f"{running.url}/v1"
            running.kill()
    print(*lines[-200:], sep="\n")


async def say(url: str, what: str, **fields: Any) -> tuple[str, list[str], str | None]:
    """The text, the arguments of the calls, and the finish reason."""
    text, calls, finish = "", list[str](), None
    async with openai.AsyncOpenAI(api_key="none", base_url=url, max_retries=0) as client:
        chunks = [
            chunk
            async for chunk in await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": f"Say {what}"}],
                tools=[TOOL],
                stream=True,
                stream_options={"include_usage": True},
                **fields,
            )
        ]
    for chunk in chunks:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
            for delta in choice.delta.tool_calls or []:
                if delta.id is not None:
                    calls.append("")
                assert delta.function is not None
                calls[delta.index] += delta.function.arguments or ""
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens > 0
    return text, calls, finish


async def test_calls_leave_the_text(url: str) -> None:
    arguments = ['{"what": "a"}', '{"what": "b"}']
    assert await say(url, "both") == ("Two.\n", arguments, "tool_calls")


async def test_without_parallel_calls_the_first_ends_the_answer(url: str) -> None:
    answer = await say(url, "both", parallel_tool_calls=False)
    assert answer == ("Two.\n", ['{"what": "a"}'], "tool_calls")


async def test_no_other_function_is_called(url: str) -> None:
    assert await say(url, "unknown") == (ANSWERS["unknown"], [], "stop")
    assert await say(url, "code") == (ANSWERS["code"], [], "stop")
    assert await say(url, "both", tool_choice="none") == (ANSWERS["both"], [], "stop")


async def test_a_stop_string_ends_the_answer_before_its_calls(url: str) -> None:
    assert await say(url, "stop", stop=["STOP"]) == ("One, ", [], "stop")
    assert await say(url, "stop", stop=["none"]) == (
        "One, STOP, two. ",
        ['{"what": "a"}'],
        "tool_calls",
    )


async def test_a_call_that_is_not_complete_is_text(url: str) -> None:
    text, calls, _ = await say(url, "cut", max_tokens=20)
    assert not calls
    assert text
    assert ANSWERS["cut"].startswith(text)
