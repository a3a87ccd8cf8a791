"""Any engine, by chance: what every other policy must beat."""

import random

from chapter4.snapshot import Snapshot


def policy(snapshot: Snapshot) -> list[float]:
    rng = random.Random(snapshot.seed)
    return [rng.random() for _ in snapshot.workers]
