"""Long-term notes: a user's own, found in later sessions, bounded and forgotten in time."""

import asyncio
from collections.abc import AsyncIterator

from chapter4.notes import MAX_BYTES, MAX_CHARACTERS, MAX_NOTES, Notes, note_tools, open_notes
from chapter4.session_settings import SessionSettings
from chapter4.tools import ToolContext, ToolError

import pytest
import pytest_asyncio

BOB = ToolContext("bob@example.org", "s1")
EVE = ToolContext("eve > *.$KV", "s1")
HOUR = 3600.0


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest_asyncio.fixture
async def notes(
    servers: dict[str, str], namespace: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Notes]:
    monkeypatch.setenv("NATS_SERVER", servers["NATS_SERVER"])
    async with open_notes(namespace, SessionSettings(ttl_s=HOUR), now=clock) as notes:
        yield notes


async def texts(notes: Notes, context: ToolContext) -> list[str]:
    return [note.text for note in await notes.notes(context)]


async def test_a_note_is_found_in_a_later_session_by_its_words(notes: Notes) -> None:
    for text in ("Bob's dog is called Rex", "Bob likes green tea", "The meeting is on Friday"):
        await notes.write_note(text, BOB)
    later = ToolContext(BOB.user, "another session")
    found = await notes.search_notes("what is the DOG called", later)
    assert found.splitlines()[0].endswith("Bob's dog is called Rex")
    assert "tea" not in found
    assert "[" in found
    assert "2027-01-15" in found


async def test_the_best_note_comes_first_and_five_at_most(notes: Notes) -> None:
    for number in range(8):
        await notes.write_note(f"green apple {number}", BOB)
    await notes.write_note("green tea from Japan", BOB)
    found = (await notes.search_notes("green tea", BOB)).splitlines()
    assert len(found) == 5
    assert found[0].endswith("green tea from Japan")


async def test_words_that_no_index_knows_are_found_as_parts(notes: Notes) -> None:
    await notes.write_note("北京是首都", BOB)
    assert "北京" in await notes.search_notes("北京", BOB)
    assert await notes.search_notes("x", BOB) == "None of the 1 notes has these words."


async def test_notes_belong_to_their_user(notes: Notes) -> None:
    await notes.write_note("Bob's secret", BOB)
    await notes.write_note("Eve's own", EVE)
    assert await texts(notes, BOB) == ["Bob's secret"]
    assert await texts(notes, EVE) == ["Eve's own"]
    assert "secret" not in await notes.search_notes("secret", EVE)
    [note] = await notes.notes(BOB)
    with pytest.raises(ToolError, match="There is no note"):
        await notes.delete_note(note.id, EVE)


async def test_without_a_user_they_belong_to_the_session(notes: Notes) -> None:
    here, there = ToolContext("", "s1"), ToolContext("", "s2")
    await notes.write_note("here", here)
    await notes.write_note("a user of that name", ToolContext("s1", "s9"))
    assert await texts(notes, here) == ["here"]
    assert await notes.list_notes(there) == "There are no notes."


async def test_the_newest_is_listed_first_and_a_deleted_one_is_gone(notes: Notes) -> None:
    await notes.write_note("first", BOB)
    await notes.write_note("second", BOB)
    assert [line.split()[-1] for line in (await notes.list_notes(BOB)).splitlines()] == [
        "second",
        "first",
    ]
    [first, second] = await notes.notes(BOB)
    assert await notes.delete_note(first.id, BOB) == f"Deleted note {first.id}."
    assert [note.id for note in await notes.notes(BOB)] == [second.id]


async def test_the_same_text_is_one_note(notes: Notes) -> None:
    """A call that is made again after a lost answer writes nothing twice."""
    assert await notes.write_note("same", BOB) == await notes.write_note("same", BOB)
    assert await texts(notes, BOB) == ["same"]


async def test_writers_at_once_lose_nothing(notes: Notes) -> None:
    await asyncio.gather(*[notes.write_note(f"note {number}", BOB) for number in range(12)])
    assert set(await texts(notes, BOB)) == {f"note {number}" for number in range(12)}


async def test_an_old_note_is_forgotten_while_others_stay(notes: Notes, clock: Clock) -> None:
    await notes.write_note("old", BOB)
    clock.now += HOUR / 2
    await notes.write_note("young", BOB)
    clock.now += HOUR / 2
    assert await texts(notes, BOB) == ["young"]
    assert "old" not in await notes.search_notes("old young", BOB)


async def test_too_many_notes_are_refused(notes: Notes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chapter4.notes.MAX_NOTES", 3)
    for number in range(3):
        await notes.write_note(f"note {number}", BOB)
    with pytest.raises(ToolError, match="There are 3 notes already; delete one first") as caught:
        await notes.write_note("one more", BOB)
    assert not caught.value.transient
    await notes.write_note("note 1", BOB)
    assert len(await notes.notes(BOB)) == 3


async def test_too_much_text_is_refused(notes: Notes) -> None:
    with pytest.raises(ToolError, match="no room"):
        await notes.write_note("x" * MAX_BYTES, BOB)
    assert await texts(notes, BOB) == []


def test_all_of_a_users_notes_are_one_message_of_nats() -> None:
    assert MAX_NOTES * MAX_CHARACTERS > MAX_BYTES
    assert MAX_BYTES < 1 << 20


async def test_they_are_tools(notes: Notes) -> None:
    tools = note_tools(notes)
    assert [tool.name for tool in tools] == [
        "write_note",
        "search_notes",
        "list_notes",
        "delete_note",
    ]
    assert [list(tool.parameters["properties"]) for tool in tools] == [
        ["text"],
        ["query"],
        [],
        ["note_id"],
    ]
    written = await tools[0].call({"text": "by a tool"}, BOB)
    assert written.startswith("Written down as note ")
    assert "by a tool" in await tools[1].call({"query": "tool"}, BOB)
