"""An engine that lends and one that borrows, in this process, by every way."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import common.kv_transfer.start
from common.kv_transfer.start import KvTransfer, kv_transfer
from tests.common.kv_transfer.kv_helpers import HOST, WAYS, StandInAgent

import pytest

StartTransfer = Callable[..., AbstractAsyncContextManager[KvTransfer]]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def agents(way: str, monkeypatch: pytest.MonkeyPatch) -> list[StandInAgent]:
    """The agents that stand in for NIXL's, in the order in which they were made."""
    agents: list[StandInAgent] = []

    def make_agent(name: str) -> StandInAgent:
        agents.append(StandInAgent(name))
        return agents[-1]

    if way == "nixl stand-in":
        monkeypatch.setattr(common.kv_transfer.start, "make_agent", make_agent)
    return agents


@pytest.fixture
def start(way: str, agents: list[StandInAgent]) -> StartTransfer:
    """`kv_transfer` by the way of the test; 64 MiB may be lent."""

    @asynccontextmanager
    async def start_one(**settings: Any) -> AsyncIterator[KvTransfer]:
        settings.setdefault("max_bytes", 2**26)
        name: Any = way.split()[0]
        async with kv_transfer(name, HOST, **settings) as transfer:
            yield transfer

    return start_one


@pytest.fixture
async def lending(start: StartTransfer) -> AsyncIterator[KvTransfer]:
    async with start() as transfer:
        yield transfer


@pytest.fixture
async def borrowing(start: StartTransfer) -> AsyncIterator[KvTransfer]:
    async with start() as transfer:
        yield transfer
