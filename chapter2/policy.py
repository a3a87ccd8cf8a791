"""Which engine to choose: pure functions of the candidates."""

import random
from collections.abc import Sequence

from common.protocol_router import Candidate, Policy


def kv_score(overlap: float, kv_usage: float, waiting: int, max_waiting: int) -> float:
    """The classic cost of KV-aware routing, as a score: 2·overlap - kv_usage - waiting.

    `overlap` is the share of the prompt that the engine has cached, `kv_usage` the share of its
    blocks in use, and `waiting` counts relative to the fullest queue. Source: Dynamo's first
    KV router (examples/llm/components/kv_router.py, 0.1).
    """
    return 2 * overlap - kv_usage - (waiting / max_waiting if max_waiting else 0.0)


def choose(
    policy: Policy,
    candidates: Sequence[Candidate],
    prompt_blocks: Sequence[float],
    turns: Sequence[int],
    rng: random.Random,
) -> tuple[Candidate, str]:
    """The engine to take, and why; sets the candidates' scores.

    For each candidate, `prompt_blocks` is the prompt's length in its blocks (the last one in
    part), and `turns` when it was last chosen: of equal ones, who waited longest is next.
    """
    if policy == "random":
        return rng.choice(candidates), f"random among {len(candidates)}"
    if policy == "kv":
        max_waiting = max(candidate.waiting for candidate in candidates)
        for candidate, length in zip(candidates, prompt_blocks, strict=True):
            candidate.score = kv_score(
                candidate.overlap_blocks / length,
                candidate.kv_usage,
                candidate.waiting,
                max_waiting,
            )
    elif policy == "least_loaded":
        for candidate in candidates:
            candidate.score = -float(candidate.running + candidate.waiting)
    keys = [
        (candidate.score or 0.0, -turn)
        for candidate, turn in zip(candidates, turns, strict=True)
    ]  # fmt: skip
    best = max(range(len(candidates)), key=keys.__getitem__)
    return candidates[best], _reason(policy, candidates, candidates[best])


def _reason(policy: Policy, candidates: Sequence[Candidate], best: Candidate) -> str:
    if policy == "round_robin":
        return f"its turn among {len(candidates)}"
    equal = sum(1 for candidate in candidates if candidate.score == best.score)
    of = f"of {len(candidates)}" + (f", {equal} are equal and it is its turn" if equal > 1 else "")
    if policy == "least_loaded":
        return f"least loaded {of}: {best.running} running, {best.waiting} waiting"
    return (
        f"best score {of}: {best.overlap_blocks} blocks cached, {best.kv_usage:.0%} of the KV "
        f"cache in use, {best.waiting} waiting"
    )
