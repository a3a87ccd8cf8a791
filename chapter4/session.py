"""One run's session: the past, the claim while the run lasts, and the commit at its end."""

import asyncio
import time
from collections.abc import Callable
from types import TracebackType

from chapter4.history import shortened
from chapter4.session_records import SessionRecord, TurnRef
from chapter4.session_settings import SessionSettings
from chapter4.session_store import SessionStore
from common.protocol import PipelineError
from common.protocol_agent import AgentRequest, Item, RunEnded, StoredResponse
from common.telemetry import log

import msgspec
from msgspec.structs import replace

COMMIT_S = 15.0  # NATS may be away for so long without a loss
RETRY_S = 0.2
SHORTEST = 256


class Session:
    """Use with `async with`, which renews the claim and gives it back.

    `history` is what was said before. `lost` is set when another run has taken the session over
    because this one did not renew its claim in time; its commit will fail.
    """

    def __init__(
        self,
        session_id: str,
        request: AgentRequest,
        record: SessionRecord,
        revision: int | None,
        store: SessionStore,
        settings: SessionSettings,
        now: Callable[[], float],
    ) -> None:
        """`revision` is None if the session is not claimed, as nobody else knows of it."""
        self.id = session_id
        self.history: list[Item] = []
        self.record = record
        self.lost = asyncio.Event()
        self._request = request
        self._revision = revision
        self._store = store
        self._settings = settings
        self._now = now
        self._renewing: asyncio.Task[None] | None = None
        self._writing = asyncio.Lock()

    async def __aenter__(self) -> "Session":
        if self.record.claim is not None:
            self._renewing = asyncio.create_task(self._renew())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.release()

    async def commit(self, output: list[Item], ended: RunEnded) -> None:
        """Store what was asked and what the run made of it, and give the claim back.

        Nothing happens if the request is not to be stored. When NATS is away, this waits for it
        for some seconds.

        Raises:
            PipelineError: kind `conflict`: the claim was lost, or the session deleted, and
                nothing of this run is stored; `unavailable`, `overloaded`, `too_large`.
        """
        if not self._request.store:
            return
        await self._stop_renewing()
        value = self._encoded(self._turn(output, ended))
        turns = [*self.record.turns, TurnRef(self._request.response_id, len(value))]
        first = self._first_kept(turns)
        deadline = time.monotonic() + COMMIT_S
        while True:
            try:
                await self._commit(value, turns[first:])
                break
            except PipelineError as error:
                if error.info.kind != "unavailable" or time.monotonic() > deadline:
                    raise
            await asyncio.sleep(RETRY_S)
        self.record.claim = None
        await self._store.forget_turns([ref.id for ref in turns[:first] if not ref.shared])

    async def release(self) -> None:
        """Give the claim back, if there is one; it ends by itself if NATS is away."""
        await self._stop_renewing()
        if self.record.claim is None:
            return
        record = replace(self.record, claim=None)
        try:
            if record.turns or record.made:
                await self._write(record)
            elif self._revision is not None:
                await self._store.forget_session(self.id, self._revision)
        except PipelineError as error:
            log.info("the claim of session %s ends by itself: %s", self.id, error)
        self.record.claim = None

    async def _commit(self, value: bytes, turns: list[TurnRef]) -> None:
        response_id = self._request.response_id
        await self._store.add_turn(response_id, value)
        try:
            await self._write(replace(self.record, turns=turns, claim=None))
        except PipelineError as error:
            if error.info.kind == "conflict":
                found = await self._store.session(self.id)
                if found and any(ref.id == response_id for ref in found.record.turns):
                    return  # an earlier try did it, and another run goes on already
            if error.info.kind in ("conflict", "overloaded"):
                await self._store.forget_turns([response_id])
            raise

    def _turn(self, output: list[Item], ended: RunEnded) -> StoredResponse:
        request = self._request
        return StoredResponse(
            id=request.response_id,
            session=self.id,
            created=int(self._now()),
            model=request.model,
            status=ended.status,
            usage=ended.usage,
            input=request.input,
            output=output,
            instructions=request.instructions,
            previous_response_id=request.previous_response_id,
            conversation=request.conversation,
            reason=ended.reason,
            error=ended.error,
            user=request.user,
            document=request.document,
        )

    def _encoded(self, whole: StoredResponse) -> bytes:
        """As JSON; if that is too long, what tools have said is shortened."""
        most = min(self._settings.max_turn, self._store.max_value)
        limit, turn = most, whole
        while len(value := msgspec.json.encode(turn)) > most:
            limit //= 2
            if limit < SHORTEST:
                message = f"The response has {len(value)} bytes; to be stored it may have {most}."
                raise PipelineError("too_large", message)
            turn = replace(whole, output=[shortened(item, limit) for item in whole.output])
        return value

    def _first_kept(self, turns: list[TurnRef]) -> int:
        """Of too many turns, or too long ones, the oldest go."""
        first = max(len(turns) - self._settings.max_turns, 0)
        while first < len(turns) - 1 and sum(t.size for t in turns[first:]) > (
            self._settings.max_session
        ):
            first += 1
        return first

    async def _renew(self) -> None:
        claim = self.record.claim
        assert claim is not None  # noqa: S101 (only a claimed session is renewed)
        while True:
            await asyncio.sleep(self._settings.lease_s / 3)
            claim.until = self._now() + self._settings.lease_s
            try:
                async with self._writing:
                    await self._write(self.record)
            except PipelineError as error:
                if error.info.kind == "conflict":
                    log.warning("%s", error)
                    self.lost.set()
                    return
                log.warning("the claim of session %s is not renewed: %s", self.id, error)

    async def _stop_renewing(self) -> None:
        if self._renewing is not None:
            async with self._writing:
                self._renewing.cancel()
            await asyncio.gather(self._renewing, return_exceptions=True)
            self._renewing = None

    async def _write(self, record: SessionRecord) -> None:
        """Change the record, which this run has claimed or nobody else knows.

        Raises:
            PipelineError: kind `conflict`: another run, or a deletion, has changed it.
        """
        while True:
            revision = await self._store.change(self.id, record, self._revision)
            if revision is not None:
                self._revision = revision
                return
            # An earlier write whose answer was lost may be the reason.
            found = await self._store.session(self.id)
            if found is not None and found.record == record:
                self._revision = found.revision
                return
            claim, own = found and found.record.claim, self.record.claim
            if found is None or claim is None or own is None or claim.holder != own.holder:
                message = (
                    f"The session {self.id!r} was changed while this run was too slow to keep it; "
                    "nothing of the run is stored."
                )
                raise PipelineError("conflict", message)
            self._revision = found.revision
