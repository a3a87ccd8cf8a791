"""`earliest_start` for agents, that come back: also in seconds.

- `place`, `queue`, `prefill`, `others`: as there. A session that comes back finds its prefix where
  it was; there it goes, unless to wait there takes longer than to compute it again elsewhere,
  which costs `others`, too;
- `awaited`: those who are expected back have their prefix there and will go before a new
  conversation, which therefore counts them as if they were there: each may take the place that it
  waits for, and each will wait for its prefill;
- `room`: what is retained for sessions, and would have to go for this request, is computed again
  when they come. The session's own blocks do not count, nor does what others can be evicted for;
- `pool`: short structured steps are for a small model's engines and answers for a large one's, if
  there are any. `WRONG_POOL_S` is what it may cost to have it so.
"""

from chapter4.agent_hints import pool_of
from chapter4.policies import earliest_start
from chapter4.snapshot import RequestView, Snapshot, WorkerView

WRONG_POOL_S = 2.0
AWAITED = 0.5  # of an engine's place and time: not all come back when they said


def policy(snapshot: Snapshot) -> list[dict[str, float]]:
    request = snapshot.request
    has_pool = any(pool_of(worker.tags) == request.pool for worker in snapshot.workers)
    wanted = request.pool if has_pool else ""
    return [
        {
            **terms,
            "awaited": -awaited_s(request, worker),
            "room": -room_s(request, worker),
            "pool": -WRONG_POOL_S if wanted and pool_of(worker.tags) != wanted else 0.0,
        }
        for terms, worker in zip(earliest_start.policy(snapshot), snapshot.workers, strict=True)
    ]


def awaited_s(request: RequestView, worker: WorkerView) -> float:
    """What it costs this request and the sessions that are expected to be at one engine."""
    if request.returning or not worker.awaited:
        return 0.0
    expected = AWAITED * worker.awaited
    places = worker.running + worker.waiting + expected + 1.0
    full = worker.max_running is not None and places > worker.max_running
    place_s = expected * worker.answer_s / max(worker.running, 1) if full else 0.0
    return place_s + expected * worker.own_prefill_s


def room_s(request: RequestView, worker: WorkerView) -> float:
    """How long it would take to compute the retained blocks again that it would evict."""
    others = worker.retained_blocks - min(worker.overlap_blocks, worker.retained_blocks)
    needed = worker.prompt_blocks - worker.overlap_blocks
    needed += request.output_tokens / worker.block_size
    free = worker.total_blocks - worker.used_blocks - worker.retained_blocks
    evicted = min(max(needed - max(free, 0), 0.0), others)
    return evicted * worker.block_size / worker.prefill_tokens_per_s
