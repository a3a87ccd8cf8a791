"""The engine with the fewest requests: even load, and a prompt lands where it is not cached."""

from chapter4.snapshot import Snapshot


def policy(snapshot: Snapshot) -> list[dict[str, float]]:
    return [
        {"running": -float(worker.running), "waiting": -float(worker.waiting)}
        for worker in snapshot.workers
    ]
