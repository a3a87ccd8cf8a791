"""What an agent's hints mean: how long its blocks are kept, and which engines it prefers."""

from collections.abc import Iterable

from common.protocol_routing import RoutingHints

LATE = 2.0  # times its own estimate a tool may take
RETURN_S = 5.0  # from a tool's end to the engine: other tools, the queue
MAX_RETAIN_S = 120.0
SMALL, LARGE = "small", "large"
_TAG = "pool="
_POOLS = {"planning": SMALL, "calling": SMALL, "answering": LARGE}


def retain_s(hints: RoutingHints) -> float:
    """How long an engine is to keep the request's blocks; 0 if its session may not come back."""
    if hints.next_turn_s is None:
        return 0.0
    return min(LATE * max(hints.next_turn_s, 0.0) + RETURN_S, MAX_RETAIN_S)


def wanted_pool(hints: RoutingHints) -> str:
    """The tag of the engines to prefer, without its `pool=`; empty: all are alike.

    Short structured steps go to a small model, what the user reads to a large one.
    """
    return hints.pool or _POOLS.get(hints.agent_state, "")


def is_returning(hints: RoutingHints) -> bool:
    """Whether somebody is in the midst of a task for which this request is one step more."""
    return hints.step > 1


def pool_of(tags: Iterable[str]) -> str:
    """The pool of an engine with these tags: that of `pool=small` is `small`."""
    return next((tag.removeprefix(_TAG) for tag in tags if tag.startswith(_TAG)), "")
