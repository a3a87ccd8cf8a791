"""Long-term notes: what an agent writes down for a user, and finds again in later sessions.

Notes belong to the user, or to the session where the request names no user. `note_tools` makes
tools of the methods with a `ToolContext`; what those return is for the model.
"""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Annotated

from chapter4.kv_bucket import Bucket, open_bucket
from chapter4.session_settings import SessionSettings
from chapter4.tools import Tool, ToolContext, ToolError, function_tool
from common.protocol import PipelineError
from common.telemetry import log

import bm25s
import msgspec
from pydantic import Field

MAX_NOTES = 200
MAX_CHARACTERS = 2000  # of one note
MAX_BYTES = 256 << 10  # of all of a user's, which are one value in the bucket
MAX_FOUND = 5
ID_DIGITS = 8

NoteText = Annotated[
    str, Field(min_length=1, max_length=MAX_CHARACTERS, description="what to remember")
]
Query = Annotated[str, Field(min_length=1, max_length=500, description="words to look for")]
NoteId = Annotated[
    str, Field(pattern=rf"^[0-9a-f]{{{ID_DIGITS}}}$", description="the id of the note")
]


class Note(msgspec.Struct):
    """`written` is in Unix seconds; the `id` follows from the text."""

    id: str
    text: str
    written: float


@asynccontextmanager
async def open_notes(
    namespace: str,
    settings: SessionSettings | None = None,
    *,
    now: Callable[[], float] = time.time,
) -> AsyncIterator["Notes"]:
    """The namespace's notes, which are forgotten as sessions are: `ttl_s` after they were written.

    Raises:
        ComponentError: NATS does not answer, refuses us, or has no JetStream.
    """
    settings = settings or SessionSettings()
    name = f"notes_{namespace}"
    async with open_bucket(name, ttl_s=settings.ttl_s, max_bytes=settings.max_store) as bucket:
        yield Notes(bucket, settings.ttl_s, now)


class Notes:
    """Each method raises `ToolError`: transient when NATS is away, else for a wrong argument."""

    def __init__(self, bucket: Bucket, ttl_s: float, now: Callable[[], float]) -> None:
        self._bucket = bucket
        self._ttl_s = ttl_s
        self._now = now

    async def write_note(self, text: NoteText, context: ToolContext) -> str:
        """Write down a fact to remember in later conversations."""
        note = Note(_note_id(text), text, self._now())

        def add(notes: list[Note]) -> list[Note]:
            others = [other for other in notes if other.id != note.id]
            if len(others) >= MAX_NOTES:
                raise ToolError(f"There are {MAX_NOTES} notes already; delete one first.")
            if len(msgspec.json.encode([*others, note])) > MAX_BYTES:
                raise ToolError("The notes have no room for that; delete some first.")
            return [*others, note]

        await self._change(context, add)
        return f"Written down as note {note.id}."

    async def search_notes(self, query: Query, context: ToolContext) -> str:
        """Find notes that were written down earlier, by words in them."""
        notes = await self.notes(context)
        found = await asyncio.to_thread(_search, query, notes)
        if not found:
            return f"None of the {len(notes)} notes has these words."
        return "\n".join(_line(note) for note in found)

    async def list_notes(self, context: ToolContext) -> str:
        """List the notes that were written down, the newest first."""
        notes = await self.notes(context)
        return "\n".join(_line(note) for note in reversed(notes)) or "There are no notes."

    async def delete_note(self, note_id: NoteId, context: ToolContext) -> str:
        """Delete a note."""

        def remove(notes: list[Note]) -> list[Note]:
            others = [note for note in notes if note.id != note_id]
            if len(others) == len(notes):
                raise ToolError(f"There is no note {note_id}.")
            return others

        await self._change(context, remove)
        return f"Deleted note {note_id}."

    async def forget_session(self, session: str) -> None:
        """Delete the notes of a session that is deleted; a user's stay."""
        try:
            await self._bucket.delete(_key(ToolContext("", session)))
        except PipelineError as error:
            log.warning("the notes of session %s stay until they expire: %s", session, error)

    async def notes(self, context: ToolContext) -> list[Note]:
        """What is written down, the oldest first."""
        notes, _ = await self._read(_key(context))
        return notes

    async def _read(self, key: str) -> tuple[list[Note], int | None]:
        try:
            entry = await self._bucket.get(key)
        except PipelineError as error:
            raise ToolError(str(error), transient=True) from error
        if entry is None:
            return [], None
        notes = msgspec.json.decode(entry.value, type=list[Note])
        oldest = self._now() - self._ttl_s
        return [note for note in notes if note.written > oldest], entry.revision

    async def _change(
        self, context: ToolContext, change: Callable[[list[Note]], list[Note]]
    ) -> None:
        key = _key(context)
        while True:
            notes, revision = await self._read(key)
            value = msgspec.json.encode(change(notes))
            try:
                if revision is None:
                    changed = await self._bucket.create(key, value)
                else:
                    changed = await self._bucket.update(key, value, revision)
            except PipelineError as error:
                raise ToolError(str(error), transient=True) from error
            if changed is not None:
                return


def note_tools(notes: Notes) -> list[Tool]:
    functions = (notes.write_note, notes.search_notes, notes.list_notes, notes.delete_note)
    return [function_tool(function) for function in functions]


def _key(context: ToolContext) -> str:
    """A user may be called anything; a key of NATS may not, nor be another user's."""
    owner = f"user {context.user}" if context.user else f"session {context.session}"
    return hashlib.sha256(owner.encode()).hexdigest()


def _note_id(text: str) -> str:
    """The same text is the same note: a call that is made again writes nothing twice."""
    return hashlib.sha256(text.encode()).hexdigest()[:ID_DIGITS]


def _line(note: Note) -> str:
    day = datetime.fromtimestamp(note.written, UTC).date()
    return f"[{note.id}, {day}] {note.text}"


def _search(query: str, notes: list[Note]) -> list[Note]:
    """The best by BM25; where no word is the same, those that contain one of the query's."""
    corpus = bm25s.tokenize([note.text for note in notes], show_progress=False)
    words = bm25s.tokenize([query], show_progress=False, return_ids=False)[0]
    known = [word for word in words if word in corpus.vocab]
    if known:
        index = bm25s.BM25()
        index.index(corpus, show_progress=False)
        scores = index.get_scores(known)
        best = sorted(range(len(notes)), key=lambda place: -scores[place])[:MAX_FOUND]
        return [notes[place] for place in best if scores[place] > 0]
    parts = query.lower().split()
    matching = [note for note in notes if any(part in note.text.lower() for part in parts)]
    return matching[::-1][:MAX_FOUND]
