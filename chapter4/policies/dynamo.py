"""The cost of Dynamo's KV router: blocks to prefill plus blocks that are held.

    prefill_load_scale * max(active_prefill + prompt_blocks - overlap_credit, 0) + decode_blocks

`active_prefill` is of prompts that have no first token yet. `decode_blocks` are the full prompt
blocks of all running requests and of this one, shared ones counted once; what they generate does
not count. The lowest cost wins. With a temperature it is a draw from the softmax of the negated
costs, which are scaled so that the best and the worst are 1 apart.

Source: "Routing Concepts" in Dynamo's documentation; `worker_logit` and `softmax_sample_index`
in lib/kv-router/src/scheduling/selector, 1.6. Left out is what this pipeline does not have: the
credits for blocks in host memory (0.75) and on disk (0.25), and weights that are 0 by default.
"""

import math
import random

from chapter4.snapshot import Snapshot

PREFILL_LOAD_SCALE = 1.0
OVERLAP_SCORE_CREDIT = 1.0
TEMPERATURE = 0.0


def policy(snapshot: Snapshot) -> list[dict[str, float]]:
    scores = []
    for worker in snapshot.workers:
        active_prefill = worker.prefill_tokens / worker.block_size
        overlap_credit = OVERLAP_SCORE_CREDIT * worker.overlap_blocks
        prefill = max(active_prefill + worker.prompt_blocks - overlap_credit, 0.0)
        decode = worker.active_prompt_blocks + worker.new_prompt_blocks
        scores.append({"prefill": -PREFILL_LOAD_SCALE * prefill, "decode": -float(decode)})
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
