"""One engine after the other: an equal number of requests each, whatever they weigh."""

from chapter4.snapshot import Snapshot


def policy(snapshot: Snapshot) -> list[dict[str, float]]:
    return [{"turn": -float(worker.turn)} for worker in snapshot.workers]
