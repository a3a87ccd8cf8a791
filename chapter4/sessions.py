"""Conversations that outlive the process: any agent goes on with any of them.

A run claims its session for a few seconds, renews that while it lives, and writes at its end.
Both are compare-and-set on the session's record, so that of two runs one fails with a conflict:
also when the other was paused for so long that it lost its claim.
"""

import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from chapter4.history import check_calls
from chapter4.kv_bucket import open_bucket
from chapter4.session import Session
from chapter4.session_records import (
    MAX_ID,
    Claim,
    SessionRecord,
    TurnRef,
    is_id,
    new_session_id,
    no_such_conversation,
    no_such_response,
)
from chapter4.session_settings import SessionSettings
from chapter4.session_store import Found, SessionStore
from common.protocol import PipelineError
from common.protocol_agent import AgentRequest, StoredConversation, StoredResponse

import msgspec


@asynccontextmanager
async def open_sessions(
    namespace: str,
    settings: SessionSettings | None = None,
    *,
    now: Callable[[], float] = time.time,
) -> AsyncIterator["Sessions"]:
    """The namespace's sessions, in the NATS that NATS_SERVER names.

    Raises:
        ComponentError: NATS does not answer, refuses us, or has no JetStream.
    """
    settings = settings or SessionSettings()
    name = f"sessions_{namespace}"
    async with open_bucket(name, ttl_s=settings.ttl_s, max_bytes=settings.max_store) as bucket:
        yield Sessions(SessionStore(bucket), settings, now)


class Sessions:
    """Every method raises `PipelineError`, kind `unavailable`, when NATS is away for seconds."""

    def __init__(
        self, store: SessionStore, settings: SessionSettings, now: Callable[[], float]
    ) -> None:
        self._store = store
        self._settings = settings
        self._now = now

    async def begin(self, request: AgentRequest) -> Session:
        """The session that the request belongs to, with what was said in it.

        It is claimed by an `async with` that begins within seconds, unless the request stores
        nothing. One without a past is new; one that goes on from another response than its
        session's last begins a new session with the same past until there.

        Raises:
            PipelineError: kind `not_found`; `conflict`: another run has the session;
                `invalid_request`: an id that cannot be, outputs without a call; `too_large`.
        """
        conversation, previous = request.conversation, request.previous_response_id
        if conversation is not None and previous is not None:
            message = "Give 'previous_response_id' or 'conversation', not both."
            raise PipelineError("invalid_request", message, "previous_response_id")
        if not is_id(request.response_id):
            message = f"The response id {request.response_id[:MAX_ID]!r} is not an id."
            raise PipelineError("invalid_request", message)
        if conversation is not None and not is_id(conversation):
            message = (
                f"'conversation' must have 1 to {MAX_ID} letters, digits, '_' and '-', not "
                f"{conversation[: MAX_ID + 1]!r}."
            )
            raise PipelineError("invalid_request", message, "conversation")
        self._check_size(request)
        session = await self._claimed(request)
        try:
            turns = await self._store.turns(session.record.turns)
            there = {turn.id for turn in turns}
            session.record.turns = [ref for ref in session.record.turns if ref.id in there]
            session.history = [item for turn in turns for item in turn.input + turn.output]
            check_calls(session.history, request.input)
        except BaseException:
            await session.release()
            raise
        return session

    async def get(self, response_id: str, user: str | None = None) -> StoredResponse:
        """A stored response; with `user` only one that this user may go on with.

        Raises:
            PipelineError: kind `not_found`.
        """
        turn, _ = await self._find(response_id, user)
        return turn

    async def delete(self, response_id: str, user: str | None = None) -> None:
        """Forget a response: what was asked and what came of it. What came later stays.

        Raises:
            PipelineError: kind `not_found`; `conflict`: a run has its session.
        """
        while True:
            turn, found = await self._find(response_id, user)
            self._check_free(turn.session, found.record)
            record = found.record
            record.turns = [ref for ref in record.turns if ref.id != response_id]
            record.claim = None
            if await self._store.change(turn.session, record, found.revision) is not None:
                await self._store.forget_turns([response_id])
                return

    async def delete_conversation(self, conversation: str, user: str | None = None) -> None:
        """Forget a session and all turns that were made in it, in those that began from it, too.

        Raises:
            PipelineError: kind `not_found`; `conflict`: a run has the session.
        """
        while True:
            found = await self._find_conversation(conversation, user)
            self._check_free(conversation, found.record)
            if await self._store.forget_session(conversation, found.revision):
                own = [ref.id for ref in found.record.turns if not ref.shared]
                await self._store.forget_turns(own)
                return

    async def create(self, user: str = "", metadata: dict[str, str] | None = None) -> str:
        """A new session without a past; its id."""
        session = new_session_id()
        record = SessionRecord(user, created=int(self._now()), made=True, metadata=metadata or {})
        await self._store.change(session, record, None)
        return session

    async def conversation(self, conversation: str, user: str | None = None) -> StoredConversation:
        """What is known of a session; `user` as for `get`.

        Raises:
            PipelineError: kind `not_found`.
        """
        record = (await self._find_conversation(conversation, user)).record
        return StoredConversation(conversation, record.created, record.metadata)

    async def turns(self, conversation: str, user: str | None = None) -> list[StoredResponse]:
        """A session's turns that are still there, oldest first; raises as `conversation` does."""
        found = await self._find_conversation(conversation, user)
        return await self._store.turns(found.record.turns)

    async def _find_conversation(self, conversation: str, user: str | None) -> Found:
        found = await self._store.session(conversation) if is_id(conversation) else None
        if found is None or not _may(user, found.record):
            raise no_such_conversation(conversation)
        return found

    async def _find(self, response_id: str, user: str | None) -> tuple[StoredResponse, Found]:
        """The turn and its session, which knows of it: a run that failed at its end has none."""
        turn = await self._store.turn(response_id) if is_id(response_id) else None
        found = None if turn is None else await self._store.session(turn.session)
        if turn is None or found is None or not _may(user, found.record):
            raise no_such_response(response_id)
        if all(ref.id != response_id for ref in found.record.turns):
            raise no_such_response(response_id)
        return turn, found

    async def _claimed(self, request: AgentRequest) -> Session:
        """The session without its history, claimed if other runs may write it, too."""
        while True:
            session_id, found = await self._wanted(request)
            now = int(self._now())
            record, revision = found or (SessionRecord(user=request.user, created=now), None)
            past = _until(record.turns, request.previous_response_id)
            forked = len(past) < len(record.turns)
            if request.store and not forked and (found or request.conversation is not None):
                self._check_free(session_id, record, request.response_id)
                until = self._now() + self._settings.lease_s
                record.claim = Claim(uuid.uuid4().hex, until, request.response_id)
                revision = await self._store.change(session_id, record, revision)
                if revision is None:
                    continue  # another one was faster
                return self._session(session_id, request, record, revision)
            if request.store and forked:
                session_id = new_session_id()
                past = [TurnRef(ref.id, ref.size, shared=True) for ref in past]
            own = SessionRecord(record.user, past, created=now)
            return self._session(session_id, request, own, None)

    async def _wanted(self, request: AgentRequest) -> tuple[str, Found | None]:
        """The session that the request names, if there is one, and its id."""
        if request.previous_response_id is not None:
            turn, found = await self._find(request.previous_response_id, request.user)
            return turn.session, found
        if request.conversation is None:
            return new_session_id(), None
        there = await self._store.session(request.conversation)
        if there is not None and not _may(request.user, there.record):
            raise no_such_conversation(request.conversation)
        return request.conversation, there

    def _session(
        self, session_id: str, request: AgentRequest, record: SessionRecord, revision: int | None
    ) -> Session:
        store, settings = self._store, self._settings
        return Session(session_id, request, record, revision, store, settings, self._now)

    def _check_free(self, session: str, record: SessionRecord, response_id: str = "") -> None:
        """Refuse a session that a run has, unless it was begun for the same response."""
        claim = record.claim
        if claim and claim.until > self._now() and claim.response != response_id:
            message = f"Another run has the session {session!r}; try again when it has ended."
            raise PipelineError("conflict", message)

    def _check_size(self, request: AgentRequest) -> None:
        """What is asked may take half of a turn; what comes of it needs room, too."""
        most = min(self._settings.max_turn, self._store.max_value) // 2
        parts = (request.input, request.instructions, request.document)
        size = len(msgspec.json.encode(parts))
        if request.store and size > most:
            message = (
                f"The request has {size} bytes; of a response that is stored it may have {most}. "
                "Send less, or 'store': false."
            )
            raise PipelineError("too_large", message, "input")


def _may(user: str | None, record: SessionRecord) -> bool:
    """Whether the session is the user's; None stands for who need not say."""
    return user is None or not record.user or record.user == user


def _until(turns: list[TurnRef], last: str | None) -> list[TurnRef]:
    """The turns until that response; all of them, if none is named."""
    ids = [ref.id for ref in turns]
    return turns if last is None else turns[: ids.index(last) + 1]
