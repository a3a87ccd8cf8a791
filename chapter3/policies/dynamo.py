"""The cost of Dynamo's KV router: blocks to prefill plus blocks that decode.

    prefill_load_scale * max(active_prefill + prompt_blocks - overlap_credit, 0) + decode_blocks

The lowest cost wins; with a temperature, the choice is drawn from the softmax of the negated
costs, scaled to the range 0 to 1. Source: "Routing Concepts" in Dynamo's documentation.
"""

import math
import random

from chapter3.snapshot import Snapshot

PREFILL_LOAD_SCALE = 1.0
OVERLAP_WEIGHT = 1.0
TEMPERATURE = 0.0


def policy(snapshot: Snapshot) -> list[dict[str, float]]:
    scores = []
    for worker in snapshot.workers:
        active_prefill = worker.prefill_tokens / worker.block_size
        overlap_credit = OVERLAP_WEIGHT * worker.overlap_blocks
        prefill = max(active_prefill + worker.prompt_blocks - overlap_credit, 0.0)
        scores.append(
            {"prefill": -PREFILL_LOAD_SCALE * prefill, "decode": -float(worker.active_blocks)}
        )
    if TEMPERATURE > 0:
        add_chance(scores, TEMPERATURE, random.Random(snapshot.seed))
    return scores


def add_chance(scores: list[dict[str, float]], temperature: float, rng: random.Random) -> None:
    """Add a term by which the highest score is a draw from the softmax of what was there.

    Gumbel's way to draw: the largest of `x / temperature - log(-log(uniform))`.
    """
    totals = [sum(terms.values()) for terms in scores]
    spread = (max(totals) - min(totals)) or 1.0
    for terms in scores:
        terms["chance"] = -math.log(-math.log(rng.random() or 0.5)) * temperature * spread
