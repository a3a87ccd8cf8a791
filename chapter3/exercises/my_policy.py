"""A policy to make better: `scripts/grade chapter3/exercises/my_policy.py:policy`.

It chooses the engine with the fewest requests, whatever it has cached and however long their
prompts are, and gets an F. What a policy sees is in `chapter3/snapshot.py`; ideas to begin with:

- `worker.overlap_blocks` of this prompt's blocks are cached there already;
- `worker.new_tokens` are the prompt's tokens that this engine would have to compute;
- `worker.prefill_s` is the time it needs for the prompts that were sent there before;
- `worker.prefill_tokens_per_s` is how fast it is: engines may differ.
"""

from chapter3.snapshot import Snapshot


def policy(snapshot: Snapshot) -> list[dict[str, float]]:
    """A score for each engine, in their order: named terms that add up. The highest wins."""
    scores = []
    for worker in snapshot.workers:
        scores.append(
            {
                "running": -float(worker.running),
                "waiting": -float(worker.waiting),
            }
        )
    return scores
