"""Sessions in NATS: any replica goes on with any of them, and of two runs at once one has it."""

import argparse
import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any

from chapter4.session_settings import (
    SessionSettings,
    add_session_arguments,
    session_settings,
)
from chapter4.sessions import Sessions, open_sessions
from common.protocol import ErrorInfo, PipelineError, Usage
from common.protocol_agent import (
    FunctionCallItem,
    FunctionOutputItem,
    Item,
    MessageItem,
    RunEnded,
    StoredResponse,
    ToolRunItem,
)
from tests.chapter4.session_helpers import ENDED, Clock, refused, request, said, turn, until

import pytest
import pytest_asyncio

Open = Callable[..., AbstractAsyncContextManager[Sessions]]

IMPOSSIBLE = ("", "a.b", "*", ">", "session.c", "a b", "../c", "c\n", "x" * 65, "ä", "$KV", "\0")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def replica(
    servers: dict[str, str], namespace: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> Open:
    """`async with replica() as sessions:` is what one agent process has."""
    monkeypatch.setenv("NATS_SERVER", servers["NATS_SERVER"])

    def open_one(
        now: Clock = clock, namespace: str = namespace, **settings: Any
    ) -> AbstractAsyncContextManager[Sessions]:
        return open_sessions(namespace, SessionSettings(**settings), now=now)

    return open_one


@pytest_asyncio.fixture
async def sessions(replica: Open) -> AsyncIterator[Sessions]:
    async with replica() as sessions:
        yield sessions


@pytest_asyncio.fixture
async def other(replica: Open) -> AsyncIterator[Sessions]:
    async with replica() as sessions:
        yield sessions


# One session, several replicas


async def test_another_replica_goes_on(sessions: Sessions, other: Sessions) -> None:
    first = await turn(sessions, "a", conversation="c")
    second = await turn(other, "b", previous_response_id=first)
    assert await said(sessions, conversation="c") == ["a", "re: a", "b", "re: b"]
    assert await said(sessions, previous_response_id=second) == ["a", "re: a", "b", "re: b"]


async def test_a_replica_that_starts_later_goes_on(replica: Open) -> None:
    async with replica() as sessions:
        last = await turn(sessions, "a")
    async with replica() as sessions:
        assert await said(sessions, previous_response_id=last) == ["a", "re: a"]


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


async def test_runs_at_once_never_interleave(replica: Open) -> None:
    """Each of them is stored as a whole or not at all, and nothing is lost."""
    async with AsyncExitStack() as stack:
        replicas = [await stack.enter_async_context(replica()) for _ in range(2)]

        async def talk(number: int) -> str | None:
            try:
                await turn(replicas[number % 2], f"{number}", conversation="c")
            except PipelineError as error:
                kinds.add(error.info.kind)
                return None
            return f"{number}"

        kinds: set[str] = set()
        done = await asyncio.gather(*[talk(number) for number in range(20)])
        stored = await said(replicas[0], conversation="c")
    assert kinds <= {"conflict"}
    assert stored[1::2] == [f"re: {text}" for text in stored[::2]]
    assert sorted(stored[::2]) == sorted(text for text in done if text)
    assert stored


@pytest.mark.parametrize("seed", range(4))
async def test_what_was_stored_is_one_history(replica: Open, clock: Clock, seed: int) -> None:
    """Whatever runs are paused for too long: each one that is stored knew of all before it."""
    dice = random.Random(seed)
    known: list[list[str]] = []

    async def talk(sessions: Sessions, text: str) -> None:
        try:
            async with await sessions.begin(request(text, conversation="c")) as session:
                if dice.random() < 0.5:
                    clock.now += SessionSettings.lease_s  # the others' claims expire meanwhile
                    for _ in range(dice.randrange(5)):
                        await said(sessions, conversation="c")
                if dice.random() < 0.8:
                    await session.commit([], ENDED)
                    past = [i.content for i in session.history if isinstance(i, MessageItem)]
                    known.append([*past, text])
        except PipelineError as error:
            kinds.add(error.info.kind)

    kinds: set[str] = set()
    async with AsyncExitStack() as stack:
        replicas = [await stack.enter_async_context(replica()) for _ in range(3)]
        for some in range(4):
            await asyncio.gather(*[talk(replicas[n % 3], f"{some}-{n}") for n in range(9)])
            clock.now += SessionSettings.lease_s + 1
        stored = await said(replicas[0], conversation="c")
    assert kinds <= {"conflict"}
    assert sorted(known, key=len) == [stored[:end] for end in range(1, len(stored) + 1)]
    assert stored


async def test_a_run_that_is_going_on_keeps_others_out(sessions: Sessions, other: Sessions) -> None:
    last = await turn(sessions, "a", conversation="c")
    async with await sessions.begin(request(conversation="c")):
        assert await refused(other.begin(request(conversation="c"))) == "conflict"
        assert await refused(other.begin(request(previous_response_id=last))) == "conflict"
        assert await refused(other.delete(last)) == "conflict"
        assert await refused(other.delete_conversation("c")) == "conflict"
        assert (await other.get(last)).id == last
        assert await said(other, conversation="c") == ["a", "re: a"]
    await turn(other, "b", conversation="c")


async def test_a_run_that_fails_gives_the_session_back_as_it_was(sessions: Sessions) -> None:
    last = await turn(sessions, "a")
    failing = request("b", previous_response_id=last)
    with pytest.raises(KeyError):
        async with await sessions.begin(failing):
            raise KeyError
    assert await refused(sessions.get(failing.response_id)) == "not_found"
    assert await said(sessions, previous_response_id=last) == ["a", "re: a"]
    await turn(sessions, "c", previous_response_id=last)


async def test_a_first_run_that_fails_leaves_no_conversation(sessions: Sessions) -> None:
    with pytest.raises(KeyError):
        async with await sessions.begin(request(conversation="c", user="bob")):
            raise KeyError
    assert await refused(sessions.delete_conversation("c")) == "not_found"
    await turn(sessions, conversation="c", user="eve")


async def test_a_cancelled_run_gives_the_session_back(sessions: Sessions, other: Sessions) -> None:
    begun = asyncio.Event()

    async def hang() -> None:
        async with await sessions.begin(request(conversation="c")):
            begun.set()
            await asyncio.Event().wait()

    running = asyncio.create_task(hang())
    await begun.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await turn(other, conversation="c")


# Claims that expire


async def test_the_claim_of_a_dead_run_expires(
    sessions: Sessions, other: Sessions, clock: Clock
) -> None:
    await sessions.begin(request(conversation="c"))  # nobody renews or releases this one
    clock.now += SessionSettings.lease_s - 0.1
    assert await refused(other.begin(request(conversation="c"))) == "conflict"
    clock.now += 0.2
    await turn(other, "b", conversation="c")
    assert await said(other, conversation="c") == ["b", "re: b"]


@pytest.mark.parametrize("past", [[], ["before"]])
async def test_what_a_dead_agent_was_asked_another_can_do_at_once(
    sessions: Sessions, other: Sessions, past: list[str]
) -> None:
    """The frontend asks another agent the same; the claim of the dead one is no hindrance."""
    for text in past:
        await turn(sessions, text, conversation="c")
    wanted = request("a", conversation="c")
    dead = await sessions.begin(wanted)
    assert await refused(other.begin(request(conversation="c"))) == "conflict"
    async with await other.begin(wanted) as session:
        assert await refused(other.begin(request(conversation="c"))) == "conflict"
        assert await refused(dead.commit([MessageItem("assistant", "late")], ENDED)) == "conflict"
        await dead.release()  # as one does that was not dead at all
        await session.commit([MessageItem("assistant", "re: a")], ENDED)
    before = [text for one in past for text in (one, f"re: {one}")]
    assert await said(other, conversation="c") == [*before, "a", "re: a"]


@pytest.mark.parametrize("first", ["commits before", "commits after", "never commits"])
async def test_a_paused_run_whose_claim_expired_fails(
    sessions: Sessions, other: Sessions, clock: Clock, first: str
) -> None:
    """What the run that took over has written is never lost, nor what it is about to write."""
    last = await turn(sessions, "a")
    paused = request("slow", previous_response_id=last)
    slow = await sessions.begin(paused)
    clock.now += SessionSettings.lease_s + 1
    quick = await other.begin(request("quick", previous_response_id=last))
    if first == "commits before":
        await quick.commit([], ENDED)
    elif first == "never commits":
        await quick.release()
    assert await refused(slow.commit([MessageItem("assistant", "late")], ENDED)) == "conflict"
    await slow.release()
    if first == "commits after":
        await quick.commit([], ENDED)
    assert await refused(sessions.get(paused.response_id)) == "not_found"
    expected = ["a", "re: a"] if first == "never commits" else ["a", "re: a", "quick"]
    assert await said(sessions, conversation=quick.id) == expected


async def test_a_late_run_that_nobody_overtook_is_stored(sessions: Sessions, clock: Clock) -> None:
    session = await sessions.begin(request("late", conversation="c"))
    clock.now += 100 * SessionSettings.lease_s
    await session.commit([], ENDED)
    assert await said(sessions, conversation="c") == ["late"]


async def test_a_run_renews_its_claim(replica: Open, clock: Clock) -> None:
    async with replica(lease_s=0.9) as sessions, replica() as other:
        async with await sessions.begin(request(conversation="c")) as session:
            for _ in range(3):
                clock.now += 0.6
                claim = session.record.claim
                assert claim is not None

                async def renewed() -> bool:
                    found = await sessions._store.session("c")
                    assert found is not None
                    assert found.record.claim is not None
                    return found.record.claim.until >= clock.now + 0.9

                await until(renewed)
            assert await refused(other.begin(request(conversation="c"))) == "conflict"
            await session.commit([], ENDED)
        await turn(other, conversation="c")


async def test_a_run_learns_that_it_was_overtaken(replica: Open, clock: Clock) -> None:
    ahead = Clock()
    ahead.now += 1000
    async with replica(lease_s=0.3) as sessions, replica(ahead) as other:
        async with await sessions.begin(request(conversation="c")) as slow:
            assert not slow.lost.is_set()
            await turn(other, "quick", conversation="c")
            await asyncio.wait_for(slow.lost.wait(), 20)
            assert await refused(slow.commit([], ENDED)) == "conflict"
        assert await said(sessions, conversation="c") == ["quick", "re: quick"]


@pytest.mark.parametrize("overtaken", [False, True])
async def test_a_commit_whose_answer_was_lost_is_one(
    sessions: Sessions, other: Sessions, monkeypatch: pytest.MonkeyPatch, overtaken: bool
) -> None:
    """Trying again writes it neither twice nor away, also when another run has gone on already."""
    session = await sessions.begin(request("a", conversation="c"))
    change = session._store.change

    async def change_unheard(*arguments: Any) -> int | None:
        monkeypatch.setattr(session._store, "change", change)
        assert await change(*arguments) is not None
        if overtaken:
            await turn(other, "b", conversation="c")
        raise PipelineError("unavailable", "no answer")

    monkeypatch.setattr(session._store, "change", change_unheard)
    await session.commit([], ENDED)
    await session.release()
    assert await said(other, conversation="c") == ["a", *(["b", "re: b"] if overtaken else [])]
    await turn(sessions, "c", conversation="c")


async def test_a_renewal_whose_answer_was_lost_is_no_conflict(sessions: Sessions) -> None:
    session = await sessions.begin(request("a", conversation="c"))
    assert session.record.claim is not None
    session.record.claim.until += 1
    await session._store.change("c", session.record, session._revision)
    await session.commit([], ENDED)
    assert await said(sessions, conversation="c") == ["a"]


# Forks


async def test_going_on_from_an_older_response_begins_another_session(
    sessions: Sessions, other: Sessions
) -> None:
    first = await turn(sessions, "a", conversation="c")
    second = await turn(sessions, "b", conversation="c")
    async with await sessions.begin(request("B", previous_response_id=first)) as fork:
        assert fork.id != "c"
        await turn(other, "c", previous_response_id=second)  # nobody waits for the fork
        await fork.commit([MessageItem("assistant", "re: B")], ENDED)
    assert await said(other, conversation=fork.id) == ["a", "re: a", "B", "re: B"]
    assert await said(other, conversation="c") == ["a", "re: a", "b", "re: b", "c", "re: c"]
    assert await said(other, previous_response_id=first) == ["a", "re: a"]


async def test_forks_of_one_response_are_apart(sessions: Sessions) -> None:
    first = await turn(sessions, "a")
    await turn(sessions, "b", previous_response_id=first)
    forks = [await turn(sessions, text, previous_response_id=first) for text in ("x", "y")]
    pasts = [await said(sessions, previous_response_id=fork) for fork in forks]
    assert pasts == [["a", "re: a", text, f"re: {text}"] for text in ("x", "y")]


async def test_a_fork_of_a_fork(sessions: Sessions) -> None:
    first = await turn(sessions, "a")
    await turn(sessions, "b", previous_response_id=first)
    forked = await turn(sessions, "x", previous_response_id=first)
    await turn(sessions, "y", previous_response_id=forked)
    again = await turn(sessions, "z", previous_response_id=forked)
    assert await said(sessions, previous_response_id=again) == [
        *("a", "re: a", "x", "re: x", "z", "re: z")
    ]


# What is not stored, and what is no longer


async def test_what_is_not_to_be_stored_is_not(sessions: Sessions) -> None:
    first = await turn(sessions, "a", conversation="c")
    secret = request("secret", conversation="c", store=False)
    async with await sessions.begin(secret) as session:
        assert session.history == [MessageItem("user", "a"), MessageItem("assistant", "re: a")]
        await session.commit([MessageItem("assistant", "x")], ENDED)
    new = request("secret", conversation="new", store=False)
    async with await sessions.begin(new) as session:
        await session.commit([], ENDED)
    assert await said(sessions, conversation="c") == ["a", "re: a"]
    for response_id in (secret.response_id, new.response_id):
        assert await refused(sessions.get(response_id)) == "not_found"
        wanted = request(previous_response_id=response_id)
        assert await refused(sessions.begin(wanted)) == "not_found"
    assert await refused(sessions.delete_conversation("new")) == "not_found"
    await turn(sessions, previous_response_id=first)


async def test_turns_are_forgotten_in_time(replica: Open, clock: Clock) -> None:
    async with replica(ttl_s=2) as sessions:
        last = await turn(sessions, "a", conversation="c")

        async def gone() -> bool:
            return await sessions._store.turn(last) is None

        await until(gone)
        assert await refused(sessions.get(last)) == "not_found"
        assert await refused(sessions.begin(request(previous_response_id=last))) == "not_found"
        assert await said(sessions, conversation="c") == []


async def test_a_session_goes_on_when_its_oldest_turn_is_forgotten(sessions: Sessions) -> None:
    first = await turn(sessions, "a", conversation="c")
    await turn(sessions, "b", conversation="c")
    await sessions._store.forget_turns([first])  # as its time comes before the session's
    assert await said(sessions, conversation="c") == ["b", "re: b"]
    await turn(sessions, "c", conversation="c")
    assert await said(sessions, conversation="c") == ["b", "re: b", "c", "re: c"]


async def test_of_too_many_turns_the_oldest_go(replica: Open) -> None:
    async with replica(max_turns=2) as sessions:
        ids = [await turn(sessions, text, conversation="c") for text in "abc"]
        assert await said(sessions, conversation="c") == ["b", "re: b", "c", "re: c"]
        assert await refused(sessions.get(ids[0])) == "not_found"
        assert await sessions._store.turn(ids[0]) is None
        assert (await sessions.get(ids[1])).id == ids[1]


async def test_of_too_long_turns_the_oldest_go(replica: Open) -> None:
    async with replica(max_session=10_000) as sessions:
        for text in "abc":
            await turn(sessions, text * 2000, conversation="c")
        kept = await said(sessions, conversation="c")
        assert [text[-1] for text in kept] == ["b", "b", "c", "c"]
        await turn(sessions, "d" * 6000, conversation="c")
        assert [text[-1] for text in await said(sessions, conversation="c")] == ["d", "d"]


async def test_what_goes_from_a_session_stays_in_no_fork(replica: Open) -> None:
    async with replica(max_turns=3) as sessions:
        first = await turn(sessions, "a", conversation="c")
        await turn(sessions, "b", conversation="c")
        fork = await turn(sessions, "x", previous_response_id=first)
        for text in "de":
            await turn(sessions, text, conversation="c")
        assert await said(sessions, previous_response_id=fork) == ["x", "re: x"]


async def test_a_request_that_is_too_large_to_store_is_refused(replica: Open) -> None:
    async with replica(max_turn=10_000) as sessions:
        large = [MessageItem("user", "x" * 6000)]
        with pytest.raises(PipelineError, match=r"it may have 5000.*'store': false") as caught:
            await sessions.begin(request(input=large, conversation="c"))
        assert (caught.value.info.kind, caught.value.info.param) == ("too_large", "input")
        async with await sessions.begin(request(input=large, store=False)) as session:
            assert session.history == []
        await turn(sessions, conversation="c")


async def test_outputs_of_tools_are_shortened_where_a_turn_would_be_too_large(
    replica: Open,
) -> None:
    async with replica(max_turn=20_000) as sessions:
        wanted = request(conversation="c")
        outputs = ["ä" * 9000, "short", "y" * 9000]
        runs = [ToolRunItem(f"{i}", "builtin", "f", "{}", text) for i, text in enumerate(outputs)]
        async with await sessions.begin(wanted) as session:
            await session.commit([*runs, MessageItem("assistant", "z" * 3000)], ENDED)
        stored = (await sessions.get(wanted.response_id)).output
        assert isinstance(stored[0], ToolRunItem)
        assert 1000 < len(stored[0].output) < 9000
        assert "characters are left out" in stored[0].output
        assert stored[1] == runs[1]
        assert stored[3] == MessageItem("assistant", "z" * 3000)


async def test_a_turn_that_cannot_be_shortened_is_refused(replica: Open) -> None:
    async with replica(max_turn=10_000) as sessions:
        with pytest.raises(PipelineError, match="to be stored it may have 10000") as caught:
            async with await sessions.begin(request(conversation="c")) as session:
                await session.commit([MessageItem("assistant", "x" * 20_000)], ENDED)
        assert caught.value.info.kind == "too_large"
        await turn(sessions, conversation="c")


async def test_a_turn_of_the_largest_size_fits_into_a_message(replica: Open) -> None:
    async with replica(max_turn=1 << 30, max_session=1 << 30) as sessions:
        wanted = request(conversation="c")
        async with await sessions.begin(wanted) as session:
            half = [MessageItem("assistant", "x" * 500_000)]
            await session.commit([*half, ToolRunItem("1", "s", "f", "{}", "y" * 900_000)], ENDED)
        stored = await sessions.get(wanted.response_id)
        assert stored.output[0] == half[0]


async def test_a_full_store_says_so_and_has_room_again_for_what_is_deleted(replica: Open) -> None:
    async with replica(max_store=20_000) as sessions:
        ids: list[str] = []

        async def fill(size: int) -> None:
            for _ in range(200):
                ids.append(await turn(sessions, "x" * size, conversation="c"))

        with pytest.raises(PipelineError, match="is full; delete") as caught:
            await fill(1000)
        assert caught.value.info.kind == "overloaded"
        assert await refused(fill(1)) == "overloaded"  # the last hundreds of bytes
        assert await said(sessions, conversation="c")
        assert (await sessions.get(ids[0])).id == ids[0]
        await sessions.delete(ids[0])
        await sessions.delete(ids[1])
        await turn(sessions, "x" * 500, conversation="c")
        assert await refused(fill(1000)) == "overloaded"
        await sessions.delete_conversation("c")
        await turn(sessions, "x" * 1000, conversation="c")


async def test_a_turn_for_which_its_session_has_no_room_is_not_left_behind(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(*_: Any) -> None:
        raise PipelineError("overloaded", "full")

    wanted = request("a", conversation="c")
    async with await sessions.begin(wanted) as session:
        with monkeypatch.context() as patch:
            patch.setattr(sessions._store, "change", full)
            assert await refused(session.commit([], ENDED)) == "overloaded"
    assert await sessions._store.turn(wanted.response_id) is None
    await turn(sessions, "b", conversation="c")
    assert await said(sessions, conversation="c") == ["b", "re: b"]


def test_the_bound_of_the_store_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def settings(*arguments: str) -> SessionSettings:
        parser = argparse.ArgumentParser()
        add_session_arguments(parser)
        return session_settings(parser.parse_args(arguments))

    assert settings().max_store is None
    assert settings("--max-store=1000000").max_store == 1_000_000
    monkeypatch.setenv("MAX_STORE", "2000000")
    assert settings().max_store == 2_000_000
    with pytest.raises(SystemExit):
        settings("--max-store=0")


# Deletion


async def test_a_deleted_response_is_gone_and_what_came_later_stays(sessions: Sessions) -> None:
    ids = [await turn(sessions, text, conversation="c") for text in "abc"]
    await sessions.delete(ids[1])
    assert await said(sessions, conversation="c") == ["a", "re: a", "c", "re: c"]
    assert await refused(sessions.get(ids[1])) == "not_found"
    assert await refused(sessions.delete(ids[1])) == "not_found"
    assert await refused(sessions.begin(request(previous_response_id=ids[1]))) == "not_found"
    assert await sessions._store.turn(ids[1]) is None
    await sessions.delete(ids[2])
    await turn(sessions, "d", previous_response_id=ids[0])  # the last one now
    assert await said(sessions, conversation="c") == ["a", "re: a", "d", "re: d"]


async def test_a_deleted_conversation_is_gone_with_its_turns(sessions: Sessions) -> None:
    first = await turn(sessions, "a", conversation="c")
    second = await turn(sessions, "b", conversation="c")
    fork = await turn(sessions, "x", previous_response_id=first)
    await sessions.delete_conversation("c")
    assert await refused(sessions.delete_conversation("c")) == "not_found"
    for response_id in (first, second):
        assert await refused(sessions.get(response_id)) == "not_found"
        assert await sessions._store.turn(response_id) is None
    assert await said(sessions, previous_response_id=fork) == ["x", "re: x"]
    assert await said(sessions, conversation="c") == []
    await turn(sessions, "new", conversation="c")
    assert await said(sessions, conversation="c") == ["new", "re: new"]


async def test_deleting_a_fork_leaves_its_origin(sessions: Sessions) -> None:
    first = await turn(sessions, "a", conversation="c")
    await turn(sessions, "b", conversation="c")
    fork = await sessions.get(await turn(sessions, "x", previous_response_id=first))
    await sessions.delete_conversation(fork.session)
    assert await said(sessions, conversation="c") == ["a", "re: a", "b", "re: b"]


async def test_a_run_does_not_bring_a_deleted_conversation_back(
    sessions: Sessions, other: Sessions, clock: Clock
) -> None:
    await turn(sessions, "a", conversation="c")
    slow = await sessions.begin(request("b", conversation="c"))
    clock.now += SessionSettings.lease_s + 1
    await other.delete_conversation("c")
    assert await refused(slow.commit([], ENDED)) == "conflict"
    assert await said(other, conversation="c") == []


# Whose it is, and ids


@pytest.mark.parametrize(
    ("owner", "user", "may"),
    [("bob", "bob", True), ("bob", "eve", False), ("bob", "", False), ("", "eve", True)],
)
async def test_a_session_is_its_users(sessions: Sessions, owner: str, user: str, may: bool) -> None:
    last = await turn(sessions, "a", conversation="c", user=owner)
    operations: list[Callable[[], Any]] = [
        lambda: said(sessions, conversation="c", user=user),
        lambda: said(sessions, previous_response_id=last, user=user),
        lambda: turn(sessions, "b", conversation="c", user=user),
        lambda: sessions.get(last, user),
        lambda: sessions.delete(last, user),
        lambda: sessions.delete_conversation("c", user),
    ]
    for operation in operations:
        if may:
            await operation()
        else:
            assert await refused(operation()) == "not_found"


async def test_a_fork_is_its_origins_users(sessions: Sessions) -> None:
    first = await turn(sessions, "a", user="bob")
    await turn(sessions, "b", previous_response_id=first, user="bob")
    fork = await turn(sessions, "x", previous_response_id=first, user="bob")
    wanted = request(previous_response_id=fork, user="eve")
    assert await refused(sessions.begin(wanted)) == "not_found"


@pytest.mark.parametrize("forged", IMPOSSIBLE)
async def test_an_id_is_never_another_key(sessions: Sessions, forged: str) -> None:
    await turn(sessions, conversation="c")
    assert await refused(sessions.begin(request(conversation=forged))) == "invalid_request"
    assert await refused(sessions.begin(request(previous_response_id=forged))) == "not_found"
    assert await refused(sessions.begin(request(response_id=forged))) == "invalid_request"
    assert await refused(sessions.get(forged)) == "not_found"
    assert await refused(sessions.delete(forged)) == "not_found"
    assert await refused(sessions.delete_conversation(forged)) == "not_found"


async def test_a_session_is_no_response_nor_the_other_way_round(sessions: Sessions) -> None:
    last = await turn(sessions, conversation="c")
    assert await refused(sessions.get("c")) == "not_found"
    assert await refused(sessions.begin(request(previous_response_id="c"))) == "not_found"
    assert await refused(sessions.delete_conversation(last)) == "not_found"


async def test_a_response_is_never_replaced(sessions: Sessions) -> None:
    first = await turn(sessions, "a", conversation="c")
    wanted = request("other", response_id=first, conversation="d")
    async with await sessions.begin(wanted) as session:
        assert await refused(session.commit([], ENDED)) == "conflict"
    assert (await sessions.get(first)).input == [MessageItem("user", "a")]
    assert await said(sessions, conversation="d") == []


async def test_a_response_and_a_conversation_are_one_too_many(sessions: Sessions) -> None:
    last = await turn(sessions)
    with pytest.raises(PipelineError, match="not both") as caught:
        await sessions.begin(request(previous_response_id=last, conversation="c"))
    assert caught.value.info.param == "previous_response_id"


async def test_namespaces_are_apart(replica: Open, namespace: str) -> None:
    async with replica() as sessions, replica(namespace=f"{namespace}-2") as others:
        last = await turn(sessions, "a", conversation="c")
        assert await refused(others.get(last)) == "not_found"
        assert await said(others, conversation="c") == []


# What is stored


async def test_a_stored_response_has_all_that_was_asked_and_made(
    sessions: Sessions, other: Sessions, clock: Clock
) -> None:
    first = await turn(sessions)
    wanted = request(
        "naïve 北京 \0",
        instructions="Be brief.",
        previous_response_id=first,
        user="",
        document={"temperature": 0.5},
    )
    output: list[Item] = [
        ToolRunItem("t1", "builtin", "calculator", '{"e": "1+1"}', "2", step=1),
        ToolRunItem("t2", "builtin", "calculator", "{", error="not JSON", step=1),
        FunctionCallItem("f1", "mine", "{}", step=2),
    ]
    usage, error = Usage(20, 5, 8), ErrorInfo("internal", "oh")
    async with await sessions.begin(wanted) as session:
        await session.commit(output, RunEnded("failed", usage, "max_steps", error))
    stored = await other.get(wanted.response_id)
    assert stored == StoredResponse(
        id=wanted.response_id,
        session=session.id,
        created=int(clock.now),
        model="m",
        status="failed",
        usage=usage,
        input=[MessageItem("user", "naïve 北京 \0")],
        output=output,
        instructions="Be brief.",
        previous_response_id=first,
        reason="max_steps",
        error=error,
        document={"temperature": 0.5},
    )
    answered = request(
        input=[FunctionOutputItem("f1", "42")], previous_response_id=wanted.response_id
    )
    async with await other.begin(answered) as session:
        assert session.history[2:] == [*stored.input, *output]
        await session.commit([MessageItem("assistant", "42")], ENDED)


async def test_outputs_of_calls_that_nobody_made_are_refused(
    sessions: Sessions, other: Sessions
) -> None:
    last = await turn(sessions, "a", conversation="c")
    wrong = [FunctionOutputItem("f9", "42")]
    with pytest.raises(
        PipelineError, match="No tool call found for function call output 'f9'"
    ) as caught:
        await sessions.begin(request(input=wrong, previous_response_id=last))
    assert (caught.value.info.kind, caught.value.info.param) == ("invalid_request", "input")
    await turn(other, "b", conversation="c")  # the refused one has not kept it


async def test_calls_must_be_answered_before_anything_else(sessions: Sessions) -> None:
    wanted = request(conversation="c")
    async with await sessions.begin(wanted) as session:
        await session.commit([FunctionCallItem("f1", "mine", "{}")], ENDED)
    with pytest.raises(PipelineError, match="No tool output found for function call 'f1'"):
        await sessions.begin(request("never mind", conversation="c"))
