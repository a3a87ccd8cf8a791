"""Answers over HTTP as they end: what is sent, what is counted, that the work is stopped."""

import asyncio
import json
from collections.abc import AsyncIterator

from common.answer import Answer
from common.frontend_metrics import FrontendMetrics
from common.openai import parse_chat
from common.protocol import PipelineError, TextOutput, Usage

import pytest
from dynamo.runtime import Context
from starlette.types import Message

SCOPE = {"type": "http", "method": "POST", "path": "/", "headers": []}


class Client:
    """A client over HTTP: what it was sent, and when it leaves."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.leaves = asyncio.Event()
        self.got_text = asyncio.Event()

    async def receive(self) -> Message:
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)
        if b"content" in message.get("body", b""):
            self.got_text.set()


def answer(
    outputs: AsyncIterator[TextOutput], *, stream: bool
) -> tuple[Answer, Context, FrontendMetrics]:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": stream}
    context, metrics = Context("request"), FrontendMetrics()
    request = parse_chat(json.dumps(body).encode())
    measured = metrics.start("chat", 1)
    return Answer(request, "request", outputs, context, measured), context, metrics


def counted(metrics: FrontendMetrics) -> list[str]:
    """The counters of requests and errors."""
    wanted = ("dynamo_frontend_requests_total", "dynamo_frontend_errors_total")
    lines = metrics.text().decode().splitlines()
    return [line.split("_", 2)[2] for line in lines if line.startswith(wanted)]


async def failing(error: Exception, first: list[TextOutput]) -> AsyncIterator[TextOutput]:
    for output in first:
        yield output
    raise error


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", [False, True])
async def test_an_unexpected_exception_counts_as_internal(stream: bool, text: bool) -> None:
    outputs = failing(KeyError("bug"), [TextOutput(text="a", tokens=1)] if text else [])
    response, context, metrics = answer(outputs, stream=stream)
    client = Client()
    with pytest.raises(KeyError):
        await response(SCOPE, client.receive, client.send)
    assert counted(metrics) == [
        'requests_total{endpoint="chat",status="500"} 1.0',
        'errors_total{kind="internal"} 1.0',
    ]
    assert metrics.in_flight == 0
    assert context.is_stopped()


async def test_a_client_that_leaves_counts_as_cancelled() -> None:
    """The engine's work is stopped; what still comes of it is read, and counted."""
    context_stopped = asyncio.Event()

    async def outputs() -> AsyncIterator[TextOutput]:
        yield TextOutput(text="a", tokens=1)
        await context_stopped.wait()
        yield TextOutput(text="b", tokens=2)
        yield TextOutput(finish_reason="cancelled", usage=Usage(3, 3))

    response, context, metrics = answer(outputs(), stream=True)
    client = Client()
    answering = asyncio.ensure_future(response(SCOPE, client.receive, client.send))
    await asyncio.wait_for(client.got_text.wait(), 20)
    client.leaves.set()
    await asyncio.wait_for(context.async_killed_or_stopped(), 20)
    assert metrics.in_flight == 1
    context_stopped.set()
    await asyncio.wait_for(answering, 20)
    assert counted(metrics) == [
        'requests_total{endpoint="chat",status="499"} 1.0',
        'errors_total{kind="cancelled"} 1.0',
    ]
    assert "dynamo_frontend_output_tokens_total 3.0" in metrics.text().decode()
    assert metrics.in_flight == 0


@pytest.mark.parametrize("text", [False, True])
async def test_a_failure_is_a_status_or_the_last_event(text: bool) -> None:
    error = PipelineError("unavailable", "The engine is gone.")
    outputs = failing(error, [TextOutput(text="a", tokens=1)] if text else [])
    response, _, metrics = answer(outputs, stream=True)
    client = Client()
    await response(SCOPE, client.receive, client.send)
    status = 200 if text else 503
    assert client.sent[0]["status"] == status
    assert b"The engine is gone." in client.sent[-1]["body"]
    assert (b"[DONE]" in client.sent[-1]["body"]) is False
    assert f'requests_total{{endpoint="chat",status="{status}"}} 1.0' in counted(metrics)
    assert 'errors_total{kind="unavailable"} 1.0' in counted(metrics)
