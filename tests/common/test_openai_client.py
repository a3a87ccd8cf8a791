"""The official `openai` client understands answers, streams and errors."""

import json
from collections.abc import AsyncIterator, Iterator

from common.openai import (
    ChatStream,
    CompletionStream,
    error_response,
    parse_chat,
    parse_completion,
    sse_error,
    to_process_request,
)
from common.protocol import ErrorInfo, ErrorKind, TextOutput, Usage

import httpx2
import openai
import pytest

MESSAGES: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]
LOST = ErrorInfo("unavailable", "the engine is gone")


class Body(httpx2.SyncByteStream, httpx2.AsyncByteStream):
    def __init__(self, parts: list[bytes]) -> None:
        self.parts = parts

    def __iter__(self) -> Iterator[bytes]:
        yield from self.parts

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self.parts:
            yield part


def serve(outputs: list[TextOutput]) -> httpx2.MockTransport:
    """A server that answers any request with the events of `outputs`."""

    def handle(http: httpx2.Request) -> httpx2.Response:
        body = http.read()
        stream: ChatStream | CompletionStream
        if http.url.path.endswith("/chat/completions"):
            chat = parse_chat(body)
            assert to_process_request(chat).model == "m"
            stream = ChatStream("r1", chat)
        else:
            stream = CompletionStream("r1", parse_completion(body))
        parts = [stream.chunk(output) for output in outputs]
        return httpx2.Response(
            200, headers={"content-type": "text/event-stream"}, stream=Body(parts)
        )

    return httpx2.MockTransport(handle)


def client(transport: httpx2.MockTransport) -> openai.OpenAI:
    return openai.OpenAI(
        api_key="none",
        base_url="http://test/v1",
        max_retries=0,
        http_client=httpx2.Client(transport=transport),
    )


ANSWER = [
    TextOutput(text="Hel", tokens=1),
    TextOutput(text="lo", tokens=1, finish_reason="length", usage=Usage(9, 2, 4)),
]


def test_chat_stream() -> None:
    with client(serve(ANSWER)) as api:
        chunks = list(
            api.chat.completions.create(
                model="m", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
            )
        )
    texts = [c.choices[0].delta.content for c in chunks if c.choices]
    assert texts == ["", "Hel", "lo", None]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert (usage.total_tokens, usage.prompt_tokens_details.cached_tokens) == (11, 4)


def test_chat_stream_helper() -> None:
    """The client's accumulating helper puts the chunks together to one whole answer."""
    answer = [ANSWER[0], TextOutput(text="lo", finish_reason="stop")]
    with (
        client(serve(answer)) as api,
        api.chat.completions.stream(model="m", messages=MESSAGES) as stream,
    ):
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "Hello"
    assert final.choices[0].message.role == "assistant"
    assert final.choices[0].finish_reason == "stop"


def test_completion_stream() -> None:
    with client(serve(ANSWER)) as api:
        chunks = list(api.completions.create(model="m", prompt="p", stream=True))
    assert [c.choices[0].text for c in chunks] == ["Hel", "lo", ""]


BROKEN_ANSWER = [TextOutput(text="Hel"), TextOutput(error=LOST)]


def test_error_inside_a_stream_raises() -> None:
    with client(serve(BROKEN_ANSWER)) as api:
        stream = api.chat.completions.create(model="m", messages=MESSAGES, stream=True)
        assert [next(stream).choices[0].delta.content for _ in range(2)] == ["", "Hel"]
        with pytest.raises(openai.APIError, match="the engine is gone") as caught:
            next(stream)
        assert (caught.value.type, caught.value.code) == ("server_error", "unavailable")
        pieces = api.completions.create(model="m", prompt="p", stream=True)
        assert next(pieces).choices[0].text == "Hel"
        with pytest.raises(openai.APIError, match="the engine is gone"):
            next(pieces)


async def test_error_inside_a_stream_raises_in_the_async_client() -> None:
    http_client = httpx2.AsyncClient(transport=serve(BROKEN_ANSWER))
    async with openai.AsyncOpenAI(
        api_key="none", base_url="http://test/v1", http_client=http_client
    ) as api:
        stream = await api.chat.completions.create(model="m", messages=MESSAGES, stream=True)
        assert [(await anext(stream)).choices[0].delta.content for _ in range(2)] == ["", "Hel"]
        with pytest.raises(openai.APIError, match="the engine is gone"):
            await anext(stream)


def test_error_event_is_the_end() -> None:
    event = sse_error(LOST)
    assert event.startswith(b"data: {")
    assert event.endswith(b"}\n\n")
    assert b"[DONE]" not in event
    assert json.loads(event[6:]) == error_response(LOST)[1]


@pytest.mark.parametrize(
    ("kind", "status", "exception", "code"),
    [
        ("invalid_request", 400, openai.BadRequestError, None),
        ("model_not_found", 404, openai.NotFoundError, "model_not_found"),
        ("not_found", 404, openai.NotFoundError, "not_found"),
        ("conflict", 409, openai.ConflictError, "conflict"),
        ("overloaded", 429, openai.RateLimitError, "overloaded"),
        ("unavailable", 503, openai.InternalServerError, "unavailable"),
        ("internal", 500, openai.InternalServerError, "internal_error"),
    ],
)
def test_error_statuses(
    kind: ErrorKind, status: int, exception: type[openai.APIStatusError], code: str | None
) -> None:
    def handle(_: httpx2.Request) -> httpx2.Response:
        status, body = error_response(ErrorInfo(kind, "what happened", "model"))
        return httpx2.Response(status, json=body)

    with (
        client(httpx2.MockTransport(handle)) as api,
        pytest.raises(exception, match="what happened") as caught,
    ):
        api.chat.completions.create(model="m", messages=MESSAGES)
    assert (caught.value.status_code, caught.value.code) == (status, code)
    assert caught.value.param == "model"
