"""What is stored of sessions, and under which keys.

`session.ID` has the order of a session's turns and who has claimed it, `turn.RESPONSE_ID` one
turn, a `StoredResponse`. A turn is written once; whether it belongs to a session, the session's
record alone says.
"""

import re
import uuid

from common.protocol import PipelineError

import msgspec

MAX_ID = 64
_ID = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_ID}}}")


class TurnRef(msgspec.Struct, omit_defaults=True):
    """A turn in a session's record; `size` is in bytes. A `shared` one was made in another."""

    id: str
    size: int
    shared: bool = False


class Claim(msgspec.Struct):
    """The run that may change the session, until a time in Unix seconds.

    `response` is the id of its response: two runs have the same where the first one's agent died
    before it had answered anything, and another agent is asked the same.
    """

    holder: str
    until: float
    response: str = ""


class SessionRecord(msgspec.Struct, omit_defaults=True):
    """A session: its turns, oldest first, of which some may have been forgotten.

    One that was `made` by itself is there without turns, too; `created` is in Unix seconds.
    """

    user: str = ""
    turns: list[TurnRef] = []
    claim: Claim | None = None
    created: int = 0
    made: bool = False
    metadata: dict[str, str] = {}


def is_id(text: str) -> bool:
    """Whether it may be part of a key: no dots, wildcards or spaces."""
    return _ID.fullmatch(text) is not None


def new_session_id() -> str:
    return f"conv_{uuid.uuid4().hex}"


def session_key(session: str) -> str:
    return f"session.{session}"


def turn_key(response_id: str) -> str:
    return f"turn.{response_id}"


def no_such_response(response_id: str) -> PipelineError:
    message = f"There is no stored response {response_id[:MAX_ID]!r}."
    return PipelineError("not_found", message, "previous_response_id")


def no_such_conversation(conversation: str) -> PipelineError:
    message = f"There is no conversation {conversation[:MAX_ID]!r}."
    return PipelineError("not_found", message, "conversation")
