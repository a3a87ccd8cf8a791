"""The official `openai` client against the running pipeline, and its types against every byte."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

from launch.pipeline import Pipeline
from tests.chapter1.helpers import CHAT, MODEL, chat, stream

import httpx
import openai
import pytest
from openai.types import Completion, Model
from openai.types.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionMessageParam,
)
from pydantic import BaseModel

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Tell me a story."}]


@pytest.fixture
def client(shared_pipeline: Pipeline) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{shared_pipeline.url}/v1", api_key="none", max_retries=0, timeout=30
    ) as client:
        yield client


@pytest.fixture
async def async_client(shared_pipeline: Pipeline) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{shared_pipeline.url}/v1", api_key="none", max_retries=0, timeout=30
    ) as client:
        yield client


def check_shape(kind: type[BaseModel], data: dict[str, Any]) -> None:
    """The data is what the client's type says, and has nothing beyond it but `nvext`."""
    parsed = kind.model_validate(data)
    pending: list[Any] = [parsed]
    while pending:
        node = pending.pop()
        if isinstance(node, BaseModel):
            assert set(node.model_extra or {}) <= {"nvext"}, node
            pending += [getattr(node, name) for name in type(node).model_fields]
        elif isinstance(node, list):
            pending += node


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=5)
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5
    assert answer.usage.prompt_tokens > 5
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 5


def test_the_stream_has_the_text_of_the_whole_answer(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=20)
    chunks = list(
        client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=20, stream=True)
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert len(chunks) > 3, "arrives in pieces"
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(chunk.usage is None for chunk in chunks)


def test_include_usage(client: openai.OpenAI) -> None:
    """OpenAI's contract: one more chunk, without choices, has the counts; the others null."""
    *chunks, last = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_completion_tokens=4,
        stream=True,
        stream_options={"include_usage": True},
    )
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 4
    assert all(chunk.usage is None for chunk in chunks)


def test_the_stream_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model=MODEL, messages=MESSAGES) as events:
        final = events.get_final_completion()
    assert final.choices[0].finish_reason == "stop"
    assert final.choices[0].message.role == "assistant"
    assert final.choices[0].message.content


def test_completions(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=10)
    pieces = list(
        client.completions.create(
            model=MODEL, prompt="Once upon a time", max_tokens=10, stream=True
        )
    )
    assert whole.choices[0].text == "".join(piece.choices[0].text for piece in pieces)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 10


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]


def test_one_model(client: openai.OpenAI) -> None:
    model = client.models.retrieve(MODEL)
    assert (model.id, model.owned_by) == (MODEL, "simulated")
    with pytest.raises(openai.NotFoundError, match="'gpt-9' does not exist"):
        client.models.retrieve("gpt-9")


def test_parameters_that_ask_for_nothing(client: openai.OpenAI) -> None:
    """What frameworks send with every request."""
    answer = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_completion_tokens=3,
        store=False,
        metadata={},
        service_tier="auto",
        modalities=["text"],
        tools=[],
        tool_choice="auto",
        parallel_tool_calls=True,
        top_p=0,
        n=1,
    )
    assert answer.choices[0].message.content


def test_errors_of_the_engine_have_the_names_that_the_client_sent(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="max_completion_tokens is") as limit:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, max_completion_tokens=8192)
    assert limit.value.param == "max_completion_tokens"
    with pytest.raises(openai.BadRequestError) as schema:
        client.chat.completions.create(
            model=MODEL, messages=MESSAGES, response_format={"type": "json_object"}, stream=True
        )
    assert schema.value.param == "response_format"
    with pytest.raises(openai.BadRequestError) as prompt:
        client.completions.create(model=MODEL, prompt=[1] * 9000)
    assert prompt.value.param == "prompt"
    with pytest.raises(openai.BadRequestError) as messages:
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "x " * 9000}]
        )
    assert messages.value.param == "messages"


def test_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt-9' does not exist") as not_found:
        client.chat.completions.create(model="gpt-9", messages=MESSAGES)
    assert (not_found.value.param, not_found.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.BadRequestError, match="'temperature'") as bad:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=9)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as several:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, n=2)
    assert several.value.param == "n"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=MODEL, input="x")


def test_an_error_before_the_first_chunk_of_a_stream(client: openai.OpenAI) -> None:
    """A stream that fails before it begins is a status code, not a stream."""
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-9", messages=MESSAGES, stream=True)
    with pytest.raises(openai.BadRequestError, match=r"prompt has .* context length is 8192"):
        client.completions.create(model=MODEL, prompt=[1] * 9000, stream=True)


async def test_async(async_client: openai.AsyncOpenAI) -> None:
    answers = await asyncio.gather(
        *[
            async_client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": f"{n}"}], max_tokens=5
            )
            for n in range(5)
        ]
    )
    assert len({answer.id for answer in answers}) == 5


async def test_async_stream(async_client: openai.AsyncOpenAI) -> None:
    chunks = await async_client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=5, stream=True
    )
    reasons = [chunk.choices[0].finish_reason async for chunk in chunks]
    assert reasons[-1] == "length"


async def test_async_client_leaves_a_stream(async_client: openai.AsyncOpenAI) -> None:
    """`break` and close, as an application does, leaves the pipeline in order."""
    chunks = await async_client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=1000, stream=True
    )
    await anext(chunks)
    await chunks.close()
    again = await async_client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=2)
    assert again.choices[0].finish_reason == "length"


@pytest.mark.parametrize("extra", [{}, {"nvext": {"extra_fields": ["worker_id", "timing"]}}])
async def test_the_shape_of_a_document(api: httpx.AsyncClient, extra: dict[str, Any]) -> None:
    document = (await api.post(CHAT, json=chat(max_tokens=3, **extra))).json()
    check_shape(ChatCompletion, document)
    assert ("nvext" in document) == bool(extra)
    if extra:
        assert document["nvext"]["worker_id"] == 0
        timing = document["nvext"]["timing"]
        assert timing["total_ms"] >= timing["engine"]["decode_ms"] > 0
    body = {"model": MODEL, "prompt": "x", "max_tokens": 3, **extra}
    completion = (await api.post("/v1/completions", json=body)).json()
    check_shape(Completion, completion)
    assert ("nvext" in completion) == bool(extra)


async def test_the_shape_of_every_chunk(api: httpx.AsyncClient) -> None:
    options = {"include_usage": True}
    extension = {"extra_fields": ["worker_id", "timing"]}
    body = chat(max_tokens=8, stream_options=options, nvext=extension)
    async with stream(api, body) as answer:
        assert answer.response.headers["content-type"] == "text/event-stream; charset=utf-8"
        await answer.read_all()
    assert answer.received[-1] == "[DONE]"
    for chunk in answer.chunks:
        check_shape(ChatCompletionChunk, chunk)
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in answer.chunks}) == 1
    assert answer.chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [chunk for chunk in answer.chunks if "nvext" in chunk] == [answer.chunks[-2]]
    assert answer.chunks[-2]["nvext"]["worker_id"] == 0


async def test_the_shape_of_every_completion_chunk(api: httpx.AsyncClient) -> None:
    body = {"model": MODEL, "prompt": "Once", "max_tokens": 8}
    async with stream(api, body, "/v1/completions") as answer:
        await answer.read_all()
    assert answer.received[-1] == "[DONE]"
    for chunk in answer.chunks:
        # The client's type knows only the last chunk's finish reason; the API sends null before.
        choice = {**chunk["choices"][0]}
        choice["finish_reason"] = choice["finish_reason"] or "stop"
        check_shape(Completion, {**chunk, "choices": [choice]})


async def test_the_shape_of_a_model(api: httpx.AsyncClient) -> None:
    models = json.loads((await api.get("/v1/models")).content)
    assert models["object"] == "list"
    check_shape(Model, models["data"][0])
