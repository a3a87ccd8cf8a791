"""Other components of the pipeline reach the chat as `frontend.chat_completions`."""

import asyncio
import json
import os
import sys
from contextlib import AsyncExitStack
from typing import Any

from launch.pipeline import Pipeline
from tests.chapter1.helpers import (
    chat,
    engine_ended,
    eventually,
    lines_about,
    nothing_in_flight,
    stream,
)

import httpx
import pytest
from openai.types.chat import ChatCompletionChunk


async def call(running: Pipeline, request: Any, *options: str) -> list[dict[str, Any]]:
    """The chunks that a component gets for `request`."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.chapter1.endpoint_caller"),
        *(running.namespace, json.dumps(request), *options),
        env={**os.environ, **running.environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        output, errors = await asyncio.wait_for(process.communicate(), timeout=60)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, errors.decode()
    return [json.loads(line) for line in output.splitlines()]


async def test_a_chat(shared_pipeline: Pipeline) -> None:
    """OpenAI's request in, OpenAI's chunks out, with the caller's request id in every log."""
    request = chat(max_tokens=5, stream_options={"include_usage": True}, stream=True)
    chunks = await call(shared_pipeline, request)
    parsed = [ChatCompletionChunk.model_validate(chunk) for chunk in chunks]
    assert "".join(c.choices[0].delta.content or "" for c in parsed if c.choices)
    assert parsed[-2].choices[0].finish_reason == "length"
    assert parsed[-1].usage is not None
    assert parsed[-1].usage.completion_tokens == 5
    for name in ("processor", "engine0"):
        child = shared_pipeline.processes[name]
        await eventually(lambda: lines_about(child, "[called-by-runtime]"))  # noqa: B023
    # The next test's request has the same id: the last line about this one is to be there.
    await eventually(
        lambda: engine_ended(shared_pipeline.processes["engine0"], "called-by-runtime")
    )


async def counted(api: httpx.AsyncClient, status: int) -> float:
    """How many calls of the endpoint ended so."""
    labels = f'endpoint="frontend.chat_completions",status="{status}"'
    lines = (await api.get("/metrics")).text.splitlines()
    name = f"dynamo_frontend_requests_total{{{labels}}} "
    return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))


async def test_a_caller_that_cancels(shared_pipeline: Pipeline, api: httpx.AsyncClient) -> None:
    cancelled = await counted(api, 499)
    engine = shared_pipeline.processes["engine0"]
    engine.log.clear()
    await call(shared_pipeline, chat("long", max_tokens=2000), "3")
    await eventually(lambda: engine_ended(engine, "called-by-runtime"))
    ended = engine_ended(engine, "called-by-runtime")
    assert ended is not None
    assert ended[0] == "cancelled"
    assert ended[1] < 500

    async def is_counted() -> bool:
        return await counted(api, 499) == cancelled + 1

    await eventually(is_counted)


async def test_calls_count_as_requests_in_flight(
    shared_pipeline: Pipeline, api: httpx.AsyncClient
) -> None:
    """The limit is the frontend's, whichever way a request comes in."""
    async with AsyncExitStack() as stack:
        body = chat(max_tokens=2000, ignore_eos=True)
        answers = [await stack.enter_async_context(stream(api, body)) for _ in range(8)]
        for answer in answers:
            await answer.read_text()
        refused = await counted(api, 429)
        (error,) = await call(shared_pipeline, chat(max_tokens=1))
        assert error["error"]["code"] == "overloaded"
        assert await counted(api, 429) == refused + 1
    await nothing_in_flight(api)


@pytest.mark.parametrize(
    ("request_body", "param"),
    [
        (chat(n=3), "n"),
        ({**chat(), "model": "gpt-9"}, "model"),
        ({}, "model"),
        (chat(response_format={"type": "json_object"}), "response_format"),
        ("text", None),
        (None, None),
    ],
)
async def test_errors_have_openais_shape(
    shared_pipeline: Pipeline, request_body: Any, param: str | None
) -> None:
    (error,) = await call(shared_pipeline, request_body)
    assert error.keys() == {"error"}
    assert error["error"]["type"] == "invalid_request_error"
    assert error["error"]["param"] == param
