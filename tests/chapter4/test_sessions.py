"""Sessions in NATS: any replica goes on with any of them, and of two runs at once one has it."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any

from chapter4.session_settings import SessionSettings
from chapter4.sessions import Sessions, open_sessions
from common.protocol import PipelineError, Usage
from common.protocol_agent import (
    AgentRequest,
    MessageItem,
    RunEnded,
)

import pytest
import pytest_asyncio

ENDED = RunEnded("completed", Usage(3, 2))
Open = Callable[..., AbstractAsyncContextManager[Sessions]]

_ids = itertools.count(1)


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def replica(
    servers: dict[str, str], namespace: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> Open:
    """`async with replica() as sessions:` is what one agent process has."""
    monkeypatch.setenv("NATS_SERVER", servers["NATS_SERVER"])

    def open_one(**settings: Any) -> AbstractAsyncContextManager[Sessions]:
        return open_sessions(namespace, SessionSettings(**settings), now=clock)

    return open_one


@pytest_asyncio.fixture
async def sessions(replica: Open) -> AsyncIterator[Sessions]:
    async with replica() as sessions:
        yield sessions


def request(text: str = "hi", **fields: Any) -> AgentRequest:
    fields.setdefault("input", [MessageItem("user", text)])
    return AgentRequest(model="m", response_id=f"resp_{next(_ids)}", **fields)


async def turn(sessions: Sessions, text: str = "hi", **fields: Any) -> str:
    """A run that answers `re: TEXT`; its response's id."""
    wanted = request(text, **fields)
    async with await sessions.begin(wanted) as session:
        await session.commit([MessageItem("assistant", f"re: {text}")], ENDED)
    return wanted.response_id


async def said(sessions: Sessions, **fields: Any) -> list[str]:
    async with await sessions.begin(request(**fields, store=False)) as session:
        return [item.content for item in session.history if isinstance(item, MessageItem)]


async def test_another_replica_goes_on(replica: Open) -> None:
    async with replica() as one, replica() as other:
        first = await turn(one, "a", conversation="c")
        second = await turn(other, "b", previous_response_id=first)
        assert await said(one, conversation="c") == ["a", "re: a", "b", "re: b"]
        assert await said(one, previous_response_id=second) == ["a", "re: a", "b", "re: b"]


async def test_of_many_runs_at_once_exactly_one_has_the_session(replica: Open) -> None:
    async with AsyncExitStack() as stack:
        replicas = [await stack.enter_async_context(replica()) for _ in range(3)]
        for conversation in ("new", "old"):
            if conversation == "old":
                await turn(replicas[0], conversation=conversation)
            begun = await asyncio.gather(
                *[sessions.begin(request(conversation=conversation)) for sessions in replicas * 8],
                return_exceptions=True,
            )
            lost = [error for error in begun if isinstance(error, PipelineError)]
            assert [error.info.kind for error in lost] == ["conflict"] * 23
            for winner in begun:
                if not isinstance(winner, BaseException):
                    await winner.release()
            await turn(replicas[0], conversation=conversation)
