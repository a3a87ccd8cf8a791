"""Applying a policy: scores in, the choice and its explanation out."""

import itertools
import math
import traceback
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from numbers import Real

from chapter4.snapshot import Policy, Score, Snapshot

MAX_ERROR = 500  # characters; a message may have the whole snapshot in it


class PolicyError(Exception):
    """A policy raised an exception, or returned what are not scores of the workers."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A worker's score as a number, and the terms that add up to it."""

    total: float
    terms: Mapping[str, float]


def scored(policy: Policy, snapshot: Snapshot) -> list[Scored]:
    """Each worker's score.

    Raises:
        PolicyError: the policy is at fault; the message says how.
    """
    count = len(snapshot.workers)
    try:
        scores = policy(snapshot)
        if isinstance(scores, (Mapping, Set)):
            raise TypeError(f"a {type(scores).__name__} is no list of scores in workers' order")
        # A generator may never end.
        results = [_scored(score) for score in itertools.islice(scores, count + 1)]
    except (Exception, SystemExit) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = "" if place.filename == __file__ else f" ({place.filename}, line {place.lineno})"
        raise PolicyError(f"the policy failed: {error!r:.{MAX_ERROR}}{where}") from error
    if len(results) != count:
        number = len(results) if len(results) < count else f"more than {count}"
        raise PolicyError(f"the policy returned {number} scores for {count} workers")
    return results


def best(scores: Sequence[Scored], snapshot: Snapshot) -> int:
    """The position of the winner: the highest score, of equal ones the one chosen longest ago."""
    keys = [
        (score.total, -worker.turn)
        for score, worker in zip(scores, snapshot.workers, strict=True)
    ]  # fmt: skip
    return max(range(len(keys)), key=keys.__getitem__)


def reason(scores: Sequence[Scored], snapshot: Snapshot, chosen: int) -> str:
    """Why it was chosen, in words."""
    winner = scores[chosen]
    others = [score.total for position, score in enumerate(scores) if position != chosen]
    terms = ", ".join(f"{name} {value:.4g}" for name, value in winner.terms.items())
    margin = f" by {winner.total - max(others):.4g}" if others else ""
    overlap = snapshot.workers[chosen].overlap_blocks
    return f"best of {len(scores)}{margin}: {terms or winner.total}; {overlap} blocks cached"


def _scored(score: Score) -> Scored:
    terms: Mapping[str, float] = (
        {str(name): _number(value) for name, value in score.items()}
        if isinstance(score, Mapping)
        else {"score": _number(score)}
    )
    total = math.fsum(terms.values())
    if not math.isfinite(total):
        raise ValueError(f"{dict(terms)} is no score")
    return Scored(total, terms)


def _number(value: object) -> float:
    if not isinstance(value, (float, int, Real)):
        raise TypeError(f"{value!r} is no number")
    return float(value)
