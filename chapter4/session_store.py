"""Sessions and turns as they lie in the bucket; each method is one look or one change."""

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from chapter4.kv_bucket import Bucket
from chapter4.session_records import (
    SessionRecord,
    TurnRef,
    session_key,
    turn_key,
)
from common.protocol import PipelineError
from common.protocol_agent import StoredResponse
from common.telemetry import log

import msgspec


class Found(NamedTuple):
    """A session's record, and the revision to name when changing it; None: it is not there yet."""

    record: SessionRecord
    revision: int | None


class SessionStore:
    """Raises `PipelineError`, kind `unavailable` or `overloaded`, where NATS cannot do it."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self.max_value = bucket.max_value

    async def session(self, session: str) -> Found | None:
        entry = await self._bucket.get(session_key(session))
        if entry is None:
            return None
        return Found(msgspec.json.decode(entry.value, type=SessionRecord), entry.revision)

    async def change(self, session: str, record: SessionRecord, revision: int | None) -> int | None:
        """The new revision; None if it is at another one, or there is one and there should not."""
        value, key = msgspec.json.encode(record), session_key(session)
        if revision is None:
            return await self._bucket.create(key, value)
        return await self._bucket.update(key, value, revision)

    async def forget_session(self, session: str, revision: int | None) -> bool:
        return await self._bucket.delete(session_key(session), revision)

    async def turn(self, response_id: str) -> StoredResponse | None:
        entry = await self._bucket.get(turn_key(response_id))
        return entry and msgspec.json.decode(entry.value, type=StoredResponse)

    async def turns(self, refs: Sequence[TurnRef]) -> list[StoredResponse]:
        """Those that are still there."""
        turns = await asyncio.gather(*[self.turn(ref.id) for ref in refs])
        return [turn for turn in turns if turn is not None]

    async def add_turn(self, response_id: str, value: bytes) -> None:
        """Write a turn, which may have happened already.

        Raises:
            PipelineError: kind `conflict`, there is another one of that id.
        """
        key = turn_key(response_id)
        if await self._bucket.create(key, value) is None:
            entry = await self._bucket.get(key)
            if entry is None or entry.value != value:
                message = f"There is a stored response {response_id!r} already."
                raise PipelineError("conflict", message)

    async def forget_turns(self, response_ids: Sequence[str]) -> None:
        """Delete turns that belong to no session any more; what is left expires by itself."""
        try:
            await asyncio.gather(*[self._bucket.delete(turn_key(id_)) for id_ in response_ids])
        except PipelineError as error:
            log.warning("turns stay until they expire: %s", error)
