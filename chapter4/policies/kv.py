"""The cost of chapter 2: what is cached against how full the engine is and how many wait.

Source: Dynamo's first KV router (examples/llm/components/kv_router.py, 0.1).
"""

from chapter4.snapshot import Snapshot


def policy(snapshot: Snapshot) -> list[dict[str, float]]:
    max_waiting = max(worker.waiting for worker in snapshot.workers)
    return [
        {
            "overlap": 2 * worker.overlap_blocks / worker.prompt_blocks,
            "KV usage": -worker.used_blocks / worker.total_blocks,
            "waiting": -worker.waiting / max_waiting if max_waiting else 0.0,
        }
        for worker in snapshot.workers
    ]
