"""With several routers, one that hangs or is gone costs a moment and no request."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any, cast

import chapter3.router_client
from chapter3.router_client import NoRouterError, ask_router, in_turn

import pytest
from dynamo.runtime import Client, Context


class FakeRouters:
    """Routers by instance id; `hung` ones never answer, `late` ones late, `dead` ones refuse."""

    def __init__(self, count: int) -> None:
        self.ids = list(range(1, count + 1))
        self.hung: set[int] = set()
        self.late: set[int] = set()
        self.dead: set[int] = set()
        self.asked: list[int] = []

    def instance_ids(self) -> list[int]:
        return self.ids

    async def direct(
        self, request: Any, instance: int, *, annotated: bool, context: Context
    ) -> AsyncIterator[Any]:
        self.asked.append(instance)
        if instance in self.dead:
            raise ValueError("Unavailable: Stream ended before generation completed")
        return self._answer(instance)

    async def _answer(self, instance: int) -> AsyncIterator[Any]:
        if instance in self.hung:
            await asyncio.Event().wait()
        if instance in self.late:
            await asyncio.sleep(3 * chapter3.router_client.ROUTER_ANSWER_S)
        yield {"router": instance}

    async def ask(self) -> int:
        answers = await ask_router(cast(Client, self), {}, dict, Context())
        return int(answers[0]["router"])


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(chapter3.router_client, "ROUTER_ANSWER_S", 0.1)
    yield
    chapter3.router_client._avoid_until.clear()


async def test_routers_take_turns() -> None:
    routers = FakeRouters(2)
    assert {await routers.ask() for _ in range(2)} == {1, 2}


async def test_a_hung_router_costs_its_time_once_and_then_nothing_for_a_while() -> None:
    routers = FakeRouters(3)
    routers.hung = {2}
    assert 2 not in [await routers.ask() for _ in range(10)]
    assert routers.asked.count(2) == 1


async def test_a_hung_router_is_asked_again_after_a_while_by_one_request_alone() -> None:
    chapter3.router_client._avoid_until[2] = 100.0
    assert [in_turn([1, 2], 99.0)[0] for _ in range(4)] == [1] * 4
    assert [in_turn([1, 2], 101.0)[0] for _ in range(4)] == [2, 1, 1, 1]
    assert in_turn([1, 2], 112.0)[0] == 2
    assert in_turn([1], 130.0) == [1]
    assert chapter3.router_client._avoid_until == {}


async def test_a_router_that_answers_again_has_its_turn_again() -> None:
    routers = FakeRouters(2)
    chapter3.router_client._avoid_until[2] = 0.0
    assert await routers.ask() == 2
    assert {await routers.ask() for _ in range(2)} == {1, 2}


async def test_a_router_that_is_gone_costs_no_request() -> None:
    routers = FakeRouters(2)
    routers.dead = {1}
    assert [await routers.ask() for _ in range(4)] == [2] * 4


async def test_the_last_one_to_ask_has_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """To give it up would fail the request, and by the runtime's doing all for the next 5 s."""
    monkeypatch.setattr(chapter3.router_client, "LAST_ROUTER_TIMES", 300)
    routers = FakeRouters(2)
    routers.late = {1, 2}
    last = await routers.ask()
    assert [instance != last for instance in routers.asked] == [True, False]


async def test_when_none_answers_the_error_says_so() -> None:
    routers = FakeRouters(2)
    routers.hung, routers.dead = {1, 2}, set()
    with pytest.raises(NoRouterError, match="did not answer within"):
        await routers.ask()
    assert sorted(routers.asked) == [1, 2]
    routers.ids = []
    with pytest.raises(NoRouterError, match="No router is up"):
        await routers.ask()
