"""Runs of an agent as far as sessions know of them."""

import asyncio
import itertools
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from chapter4.sessions import Sessions
from common.protocol import PipelineError, Usage
from common.protocol_agent import AgentRequest, MessageItem, RunEnded

import pytest

ENDED = RunEnded("completed", Usage(3, 2))

_ids = itertools.count(1)
_process = uuid.uuid4().hex[:8]


class Clock:
    """Time passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def request(text: str = "hi", **fields: Any) -> AgentRequest:
    fields.setdefault("input", [MessageItem("user", text)])
    fields.setdefault("response_id", f"resp_{_process}_{next(_ids)}")
    return AgentRequest(model="m", **fields)


async def turn(sessions: Sessions, text: str = "hi", **fields: Any) -> str:
    """A run that answers `re: TEXT`; its response's id."""
    wanted = request(text, **fields)
    async with await sessions.begin(wanted) as session:
        await session.commit([MessageItem("assistant", f"re: {text}")], ENDED)
    return wanted.response_id


async def said(sessions: Sessions, **fields: Any) -> list[str]:
    """What a run that stores nothing is told of the past."""
    async with await sessions.begin(request(**fields, store=False)) as session:
        return [item.content for item in session.history if isinstance(item, MessageItem)]


async def refused(work: Awaitable[Any]) -> str:
    """The kind of the error that it ends with."""
    with pytest.raises(PipelineError) as caught:
        await work
    return caught.value.info.kind


async def until(
    holds: Callable[[], Awaitable[bool]], *, but: str = "", timeout: float = 30.0
) -> None:
    """Wait until it holds; errors of the kind `but` may come first."""
    async with asyncio.timeout(timeout):
        while True:
            try:
                if await holds():
                    return
            except PipelineError as error:
                if error.info.kind != but:
                    raise
            await asyncio.sleep(0.02)
