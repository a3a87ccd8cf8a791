"""The less loaded of two engines drawn by chance.

Nearly as even as the least loaded of all, and several routers that know the load a little late
do not all send to the same engine. Source: M. Mitzenmacher, The Power of Two Choices in
Randomized Load Balancing (1996).
"""

import random

from chapter4.snapshot import Snapshot

NOT_DRAWN = 1e9


def policy(snapshot: Snapshot) -> list[dict[str, float]]:
    rng = random.Random(snapshot.seed)
    count = len(snapshot.workers)
    drawn = rng.sample(range(count), min(2, count))
    return [
        {
            "load": -float(worker.running + worker.waiting),
            "not drawn": 0.0 if position in drawn else -NOT_DRAWN,
        }
        for position, worker in enumerate(snapshot.workers)
    ]
