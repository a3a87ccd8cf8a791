"""How long and how much the agent remembers."""

import argparse
import os
from dataclasses import dataclass

from common.arguments import positive_int, positive_seconds

LEASE_S = 6.0


@dataclass(frozen=True)
class SessionSettings:
    """Limits of sessions; sizes are in bytes of JSON.

    A turn or a session is forgotten `ttl_s` after it was written last. Over `max_turns` or
    `max_session` the oldest turns of a session go. `max_turn` is for one turn, and never more
    than a message of NATS can have. `max_store` is for all of them, and again for all notes, and
    NATS reserves it; None is as much as NATS has. When it is reached, nothing is stored until
    something expires or is deleted.

    A run has its session for `lease_s` and renews that while it lives: so long after its death
    the session is free again. The clocks of the agents' machines should agree within a second.
    """

    ttl_s: float = 7 * 86400.0
    max_turns: int = 200
    max_session: int = 4 << 20
    max_turn: int = 512 << 10
    max_store: int | None = None
    lease_s: float = LEASE_S


def add_session_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of what `session_settings` makes settings."""
    parser.add_argument(
        "--session-ttl",
        type=positive_seconds,
        metavar="SECONDS",
        default=os.environ.get("SESSION_TTL", str(int(SessionSettings.ttl_s))),
        help="forget what was said, and notes, after so long (env SESSION_TTL, %(default)s)",
    )
    parser.add_argument(
        "--max-store",
        type=positive_int,
        metavar="BYTES",
        default=os.environ.get("MAX_STORE") or None,
        help="NATS reserves so much for all sessions, and as much for all notes; when it is full, "
        "runs get a 429 until something expires or is deleted (env MAX_STORE; else what NATS has)",
    )


def session_settings(args: argparse.Namespace) -> SessionSettings:
    return SessionSettings(ttl_s=args.session_ttl, max_store=args.max_store)
