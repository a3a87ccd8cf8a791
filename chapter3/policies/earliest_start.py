"""Where the first token comes first, by the time that the engine's prefill will take.

Everything is in seconds, so that nothing needs a weight:

- `queue`: prompts sent there before this one are computed first;
- `prefill`: what of this prompt is not cached there is computed next.
"""

from chapter3.snapshot import Snapshot


def policy(snapshot: Snapshot) -> list[dict[str, float]]:
    return [
        {
            "queue": -worker.prefill_s,
            "prefill": -worker.new_tokens / worker.prefill_tokens_per_s,
        }
        for worker in snapshot.workers
    ]
