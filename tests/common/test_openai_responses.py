"""Answers and chunks have OpenAI's shapes, as the official client's own types see them."""

import json
from typing import Any

from common.openai import (
    ChatCompletionRequest,
    ChatStream,
    CompletionRequest,
    CompletionStream,
    chat_response,
    completion_response,
    model_document,
    model_list,
    parse_chat,
    parse_completion,
)
from common.protocol import (
    EngineInfo,
    EngineTimings,
    ErrorInfo,
    LogprobEntry,
    PipelineError,
    PositionLogprobs,
    TextOutput,
    Timings,
    Usage,
)

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

TIMINGS = Timings(tokenize_ms=0.5, total_ms=30.0, engine=EngineTimings(1.0, 9.0, 18.5))
TIMING_JSON = {
    "tokenize_ms": 0.5,
    "total_ms": 30.0,
    "engine": {"queue_ms": 1.0, "prefill_ms": 9.0, "decode_ms": 18.5},
}
OUTPUTS = [
    TextOutput(text="Hello", tokens=1),
    TextOutput(text="", tokens=1),
    TextOutput(text=' "wörld"\n', tokens=2),
    TextOutput(
        text="!",
        tokens=1,
        finish_reason="stop",
        usage=Usage(prompt_tokens=20, completion_tokens=5, cached_tokens=16),
        timings=TIMINGS,
        worker_id=3,
    ),
]
TEXT = 'Hello "wörld"\n!'
USAGE_JSON = {
    "prompt_tokens": 20,
    "completion_tokens": 5,
    "total_tokens": 25,
    "prompt_tokens_details": {"cached_tokens": 16},
}
NVEXT = {"extra_fields": ["worker_id", "timing"]}


def chat(**parameters: Any) -> ChatCompletionRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **parameters}
    return parse_chat(json.dumps(body).encode())


def completion(**parameters: Any) -> CompletionRequest:
    return parse_completion(json.dumps({"model": "m", "prompt": "p", **parameters}).encode())


def entry(data: bytes, logprob: float) -> LogprobEntry:
    return LogprobEntry(data.decode(errors="replace"), logprob, list(data))


def position(*entries: LogprobEntry) -> PositionLogprobs:
    return PositionLogprobs(entries[0], list(entries))


def validated(model: type[BaseModel], data: dict[str, Any], extensions: set[str]) -> None:
    """`data` is a valid `model`, with nothing in it that the model does not know."""
    parsed = model.model_validate(data)
    assert parsed.model_dump(exclude_unset=True) == data
    check_extras(parsed, extensions)


def check_extras(node: Any, allowed: set[str]) -> None:
    if isinstance(node, BaseModel):
        assert set(node.model_extra or ()) <= allowed
        for name in type(node).model_fields:
            check_extras(getattr(node, name), set())
    elif isinstance(node, list):
        for item in node:
            check_extras(item, set())


def events(stream: bytes) -> list[Any]:
    """The JSON of each server-sent event, and the string `[DONE]`."""
    assert stream.endswith(b"\n\n")
    datas = [event.removeprefix("data: ") for event in stream.decode().split("\n\n")[:-1]]
    return [data if data == "[DONE]" else json.loads(data) for data in datas]


def chat_events(request: ChatCompletionRequest, outputs: list[TextOutput]) -> list[Any]:
    stream = ChatStream("r1", request)
    chunks = events(b"".join(map(stream.chunk, outputs)))
    for chunk in chunks:
        if chunk != "[DONE]" and "error" not in chunk:
            validated(ChatCompletionChunk, chunk, {"nvext"})
    return chunks


def completion_events(request: CompletionRequest, outputs: list[TextOutput]) -> list[Any]:
    stream = CompletionStream("r1", request)
    chunks = events(b"".join(map(stream.chunk, outputs)))
    for chunk in chunks:
        if chunk != "[DONE]" and "error" not in chunk:
            # The type wants a finish reason in every chunk; OpenAI's own server sends null.
            finished = [
                {**c, "finish_reason": c["finish_reason"] or "stop"} for c in chunk["choices"]
            ]
            validated(Completion, {**chunk, "choices": finished}, {"nvext"})
    return chunks


def test_chat_stream() -> None:
    chunks = chat_events(chat(stream=True), OUTPUTS)
    created = chunks[0]["created"]
    common = {
        "id": "chatcmpl-r1",
        "object": "chat.completion.chunk",
        "created": created,
        "model": "m",
    }

    def chunk(delta: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**common, "choices": [choice]}

    assert chunks == [
        chunk({"role": "assistant", "content": "", "refusal": None}, None),
        chunk({"content": "Hello"}, None),
        chunk({"content": ' "wörld"\n'}, None),
        chunk({"content": "!"}, None),
        chunk({}, "stop"),
        "[DONE]",
    ]


def test_chat_stream_with_usage_and_extensions() -> None:
    request = chat(stream=True, stream_options={"include_usage": True}, nvext=NVEXT)
    chunks = chat_events(request, OUTPUTS)
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * 5 + [USAGE_JSON]
    assert chunks[-2]["choices"] == []
    assert [chunk.get("nvext") for chunk in chunks[:-3]] == [None] * 4
    assert chunks[-3]["nvext"] == {"worker_id": 3, "timing": TIMING_JSON}
    assert chunks[-1] == "[DONE]"


def test_nothing_to_tell_is_no_bytes() -> None:
    """A token that completes no character makes no event, except that the first tells the role."""
    stream = ChatStream("r1", chat(stream=True))
    assert b'"role":"assistant"' in stream.chunk(TextOutput(tokens=1))
    assert stream.chunk(TextOutput(tokens=1)) == b""
    assert CompletionStream("r1", completion(stream=True)).chunk(TextOutput(tokens=1)) == b""


def test_completion_stream() -> None:
    request = completion(stream=True, stream_options={"include_usage": True}, nvext=NVEXT)
    chunks = completion_events(request, OUTPUTS)
    choices = [choice for chunk in chunks[:-1] for choice in chunk["choices"]]
    assert [choice["text"] for choice in choices] == ["Hello", ' "wörld"\n', "!", ""]
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "stop"]
    assert {chunk["id"] for chunk in chunks[:-1]} == {"cmpl-r1"}
    assert {chunk["object"] for chunk in chunks[:-1]} == {"text_completion"}
    assert chunks[-3]["nvext"] == {"worker_id": 3, "timing": TIMING_JSON}
    assert chunks[-2]["usage"] == USAGE_JSON
    assert chunks[-1] == "[DONE]"


@settings(deadline=None)
@given(st.text())
def test_any_text_survives_the_stream(text: str) -> None:
    """Quotes, newlines, control characters and line separators neither break nor split events."""
    outputs = [TextOutput(text=text), TextOutput(finish_reason="length")]
    chunks = chat_events(chat(stream=True), outputs)[:-1]
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == text
    pieces = completion_events(completion(stream=True), outputs)[:-1]
    assert "".join(c["choices"][0]["text"] for c in pieces) == text
    assert pieces[-1]["choices"][0]["finish_reason"] == "length"


def test_chat_response() -> None:
    response = json.loads(chat_response("r1", chat(nvext=NVEXT), OUTPUTS))
    validated(ChatCompletion, response, {"nvext"})
    assert response == {
        "id": "chatcmpl-r1",
        "object": "chat.completion",
        "created": response["created"],
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": TEXT, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": USAGE_JSON,
        "nvext": {"worker_id": 3, "timing": TIMING_JSON},
    }


def test_completion_response() -> None:
    response = json.loads(completion_response("r1", completion(), OUTPUTS))
    validated(Completion, response, set())
    choice = {"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop"}
    assert response == {
        "id": "cmpl-r1",
        "object": "text_completion",
        "created": response["created"],
        "model": "m",
        "choices": [choice],
        "usage": USAGE_JSON,
    }


def test_only_the_extensions_asked_for() -> None:
    request = chat(nvext={"extra_fields": ["worker_id"]})
    assert json.loads(chat_response("r1", request, OUTPUTS))["nvext"] == {"worker_id": 3}


PARTS = "é🥐".encode()
LOGPROB_OUTPUTS = [
    TextOutput(
        text="a",
        tokens=2,
        logprobs=[
            position(entry(b"a", -0.1), entry(b"b", -2.5)),
            position(entry(PARTS[:1], float("-inf"))),  # the first half of é
        ],
    ),
    TextOutput(text="é", tokens=1, logprobs=[position(entry(PARTS[1:4], -1.0))]),
    TextOutput(
        text="🥐",
        tokens=1,
        logprobs=[PositionLogprobs(entry(PARTS[4:], -3.0), [entry(b"x", -0.5)])],
        finish_reason="length",
        usage=Usage(1, 4),
    ),
]
CHAT_LOGPROBS = [
    {
        "token": "a",
        "logprob": -0.1,
        "bytes": [97],
        "top_logprobs": [
            {"token": "a", "logprob": -0.1, "bytes": [97]},
            {"token": "b", "logprob": -2.5, "bytes": [98]},
        ],
    },
    {
        "token": "\ufffd",
        "logprob": -9999.0,
        "bytes": [0xC3],
        "top_logprobs": [{"token": "\ufffd", "logprob": -9999.0, "bytes": [0xC3]}],
    },
]


def test_chat_logprobs() -> None:
    request = chat(stream=True, logprobs=True, top_logprobs=2)
    chunks = chat_events(request, LOGPROB_OUTPUTS)[:-1]
    logprobs = [c["choices"][0]["logprobs"] for c in chunks]
    streamed = [item for value in logprobs if value for item in value["content"]]
    whole = json.loads(chat_response("r1", request, LOGPROB_OUTPUTS))
    validated(ChatCompletion, whole, set())
    assert whole["choices"][0]["logprobs"] == {"content": streamed, "refusal": None}
    assert streamed[:2] == CHAT_LOGPROBS
    assert bytes(b for item in streamed for b in item["bytes"]) == b"a" + PARTS


def test_completion_logprobs() -> None:
    request = completion(stream=True, logprobs=2)
    chunks = completion_events(request, LOGPROB_OUTPUTS)[:-1]
    streamed = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["logprobs"]]
    whole = json.loads(completion_response("r1", request, LOGPROB_OUTPUTS))
    validated(Completion, whole, set())
    assert whole["choices"][0]["logprobs"] == {
        "tokens": ["a", "\ufffd", PARTS[1:4].decode(errors="replace"), "\ufffd\ufffd"],
        "token_logprobs": [-0.1, -9999.0, -1.0, -3.0],
        "top_logprobs": [
            {"a": -0.1, "b": -2.5},
            {"\ufffd": -9999.0},
            {PARTS[1:4].decode(errors="replace"): -1.0},
            {"x": -0.5, "\ufffd\ufffd": -3.0},
        ],
        # In the text "aé🥐" the third token ends é, the last one ends the croissant.
        "text_offset": [0, 1, 1, 2],
    }
    for name, values in whole["choices"][0]["logprobs"].items():
        assert [value for part in streamed for value in part[name]] == values


def test_answer_that_broke_off() -> None:
    """What a failed or an unfinished stream has said so far is never passed off as an answer."""
    failed = [TextOutput(text="He"), TextOutput(error=ErrorInfo("overloaded", "full", "p"))]
    with pytest.raises(PipelineError, match="full") as caught:
        chat_response("r1", chat(), failed)
    assert caught.value.info == ErrorInfo("overloaded", "full", "p")
    with pytest.raises(PipelineError, match="before it was complete"):
        completion_response("r1", completion(), OUTPUTS[:-1])
    with pytest.raises(PipelineError, match="before it was complete"):
        chat_response("r1", chat(), [])


def test_cancelled_is_an_error() -> None:
    """`cancelled` is no finish reason of OpenAI's: an engine that shuts down fails the request."""
    cancelled = TextOutput(text="half", finish_reason="cancelled")
    with pytest.raises(PipelineError, match="cancelled"):
        chat_response("r1", chat(), [cancelled])
    for chunks in (
        chat_events(chat(stream=True), [OUTPUTS[0], cancelled]),
        completion_events(completion(stream=True), [OUTPUTS[0], cancelled]),
    ):
        assert chunks[-1]["error"]["code"] == "unavailable"


ENGINE = EngineInfo("m", backend="llamacpp", context_length=8, block_size=4, total_blocks=2)
CREATED = 1_700_000_000
CARD = {"id": "m", "object": "model", "created": CREATED, "owned_by": "dynamo-pipelines"}


def test_models() -> None:
    assert model_list(ENGINE, CREATED).model_dump() == {"object": "list", "data": [CARD]}
    assert model_document(ENGINE, "m", CREATED).model_dump() == CARD
    validated(Model, CARD, set())


def test_simulated_models_are_not_passed_off_as_real() -> None:
    simulated = msgspec.structs.replace(ENGINE, simulated=True)
    for card in (model_document(simulated, "m", 1), *model_list(simulated, 1).data):
        assert card.owned_by == "simulated"


@pytest.mark.parametrize("name", ["gpt-9", "", "m\n2026 INFO forged", "x" * 10_000])
def test_a_model_that_is_not_there(name: str) -> None:
    with pytest.raises(PipelineError, match=r"does not exist; 'm' does") as caught:
        model_document(ENGINE, name, 1)
    info = caught.value.info
    assert (info.kind, info.param) == ("model_not_found", "model")
    assert info.message.isprintable()
    assert len(info.message) < 200


def test_encoded_chunk_is_what_a_plain_encoder_makes() -> None:
    """The hand-joined bytes are exactly the JSON of the chunk: nothing but a faster way."""
    stream = ChatStream("r1", chat(stream=True))
    stream.chunk(TextOutput())
    data = stream.chunk(TextOutput(text='a"\\\u2028')).removeprefix(b"data: ").removesuffix(b"\n\n")
    assert msgspec.json.encode(json.loads(data)) == data
