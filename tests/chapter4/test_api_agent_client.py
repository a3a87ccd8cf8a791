"""The frontend's questions to the agent: how a run begins, ends and fails."""

from collections.abc import AsyncIterator
from typing import Any, cast

from chapter4.agent_client import ask_agent, delete_stored, stored_response
from chapter4.hints import parse_response_request
from common.protocol import ErrorInfo, PipelineError, Usage, to_wire
from common.protocol_agent import (
    AgentEvent,
    AgentRequest,
    MessageItem,
    RunEnded,
    StepStarted,
    StoredOutput,
    StoredQuery,
    StoredResponse,
    TextDelta,
)

import pytest
from dynamo.runtime import Client, Context

REQUEST = parse_response_request(b'{"model": "m", "input": "hi"}')
TASK = AgentRequest("m", "resp_1", [MessageItem("user", "hi")])
BEGUN = [StepStarted(1, 1), TextDelta(0, "Hello")]
ENDED = RunEnded("completed", Usage(1, 2))
TOO_LONG = ErrorInfo("invalid_request", "token_ids has too many", "token_ids")
QUERY = StoredQuery("resp_1")


class FakeClient:
    """An endpoint: each call gets the next of `streams`, messages or an exception at the end."""

    def __init__(self, *streams: list[Any]) -> None:
        self.streams = list(streams)

    async def round_robin(self, *_: Any, **__: Any) -> AsyncIterator[Any]:
        return self._stream(self.streams.pop(0))

    async def _stream(self, items: list[Any]) -> AsyncIterator[Any]:
        for item in items:
            if isinstance(item, Exception):
                raise item
            yield to_wire(item)


def client(*streams: list[Any]) -> Client:
    return cast(Client, FakeClient(*streams))


async def run(*streams: list[Any]) -> tuple[list[AgentEvent], ErrorInfo | None]:
    """The events that came, and the error that ended them."""
    events: list[AgentEvent] = []
    try:
        async for event in ask_agent(client(*streams), TASK, REQUEST, Context("r")):
            events.append(event)
    except PipelineError as error:
        return events, error.info
    return events, None


async def test_a_run() -> None:
    assert await run([*BEGUN, ENDED]) == ([*BEGUN, ENDED], None)


async def test_a_run_that_cannot_begin_raises_in_the_clients_words() -> None:
    events, error = await run([RunEnded("failed", Usage(0, 0), error=TOO_LONG)])
    assert events == []
    assert error is not None
    assert (error.param, error.message) == ("input", "input has too many")


async def test_a_run_that_fails_later_says_so_at_its_end() -> None:
    events, error = await run([*BEGUN, RunEnded("failed", Usage(0, 0), error=TOO_LONG)])
    assert error is None
    last = events[-1]
    assert isinstance(last, RunEnded)
    assert last.error is not None
    assert last.error.param == "input"


async def test_another_agent_takes_over_what_has_not_begun() -> None:
    gone = Exception("Unavailable: Stream ended before generation completed")
    assert await run([gone], [*BEGUN, ENDED]) == ([*BEGUN, ENDED], None)


async def test_a_run_that_has_begun_ends_with_its_agent() -> None:
    gone = Exception("Unavailable: Stream ended before generation completed")
    events, error = await run([*BEGUN, gone], [*BEGUN, ENDED])
    assert events == BEGUN
    assert error is not None
    assert error.kind == "unavailable"


async def test_a_run_without_an_end_is_no_answer() -> None:
    events, error = await run(BEGUN)
    assert events == BEGUN
    assert error is not None
    assert error.kind == "unavailable"


async def test_what_is_stored() -> None:
    stored = StoredResponse("resp_1", "c", 1, "m", "completed", Usage(1, 1), [], [])
    assert await stored_response(client([StoredOutput(stored)]), QUERY) == stored
    await delete_stored(client([StoredOutput()]), QUERY)


@pytest.mark.parametrize(
    ("stream", "kind"),
    [
        ([StoredOutput(error=ErrorInfo("not_found", "none"))], "not_found"),
        ([], "unavailable"),
        ([Exception("Unavailable: no responders")], "unavailable"),
    ],
)
async def test_what_is_not_stored(stream: list[Any], kind: str) -> None:
    for ask in (stored_response, delete_stored):
        with pytest.raises(PipelineError) as caught:
            await ask(client(stream), QUERY)
        assert caught.value.info.kind == kind
