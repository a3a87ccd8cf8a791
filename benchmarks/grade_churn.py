"""Whether a policy that remembers also forgets: many sessions that never come back."""

import gc
import random
import tracemalloc
from collections import deque
from collections.abc import Iterable

from benchmarks.trace import BLOCK_SIZE
from chapter3.scoring import scored
from chapter3.snapshot import Policy, RequestView, Snapshot, WorkerView

Prompt = tuple[int, tuple[WorkerView, ...]]

ENGINES = 8
PROMPTS = 32  # what engines look like for one, between two replacements
REQUESTS_PER_S = 100.0
REQUESTS_PER_ENGINE = 500  # until one of the engines is replaced by a new one
WARM_UP = 1 / 3  # of the decisions
ALLOWED_BYTES = 32 * 1024  # tables that are full grow and shrink a little


def churn(policy: Policy, seed: int, decisions: int) -> float:
    """How many bytes the policy keeps of each decision after the warm-up.

    Every request is of another session, one of 50 tenants that come and go; engines are replaced.

    Raises:
        PolicyError: the policy failed.
    """
    rng = random.Random(f"churn/{seed}")
    engines = deque(range(ENGINES), maxlen=ENGINES)
    prompts: list[Prompt] = []
    measured_from = round(decisions * WARM_UP)
    before = 0
    tracemalloc.start()
    try:
        for number in range(decisions):
            if number % REQUESTS_PER_ENGINE == 0:
                engines.append(engines[-1] + 1)
                prompts = [_prompt(rng, engines) for _ in range(PROMPTS)]
            if number == measured_from:
                before = _traced_bytes()
            tokens, workers = rng.choice(prompts)
            request = RequestView(
                prompt_tokens=tokens,
                output_tokens=rng.uniform(1, 1000),
                session=f"session {number}",
                tenant=f"tenant {number // 1000 + rng.randrange(50)}",
                priority=rng.randrange(3),
            )
            now = number / REQUESTS_PER_S
            scored(policy, Snapshot(request, workers, now, rng.getrandbits(32)))
        after = _traced_bytes()
    finally:
        tracemalloc.stop()
    return max(after - before - ALLOWED_BYTES, 0) / (decisions - measured_from)


def _traced_bytes() -> int:
    gc.collect()  # which also frees what Python keeps for the next objects of a type
    return tracemalloc.get_traced_memory()[0]


def _prompt(rng: random.Random, engines: Iterable[int]) -> Prompt:
    tokens = rng.randint(1, 20_000)
    full_blocks = tokens // BLOCK_SIZE
    workers = tuple(
        WorkerView(
            instance_id=engine,
            worker_id=position,
            block_size=BLOCK_SIZE,
            prompt_blocks=tokens / BLOCK_SIZE,
            overlap_blocks=rng.choice((0, 0, rng.randint(0, full_blocks))),
            running=rng.randrange(50),
            waiting=max(rng.randrange(20) - 15, 0),
            used_blocks=rng.randrange(1000),
            total_blocks=1000,
            prefill_tokens=(waiting := rng.randrange(9000)),
            new_prompt_blocks=full_blocks,
            prefill_s=waiting / 8000,
            turn=rng.randrange(1000),
            health=rng.choice(("healthy", "healthy", "probing")),
        )
        for position, engine in enumerate(engines)
    )
    return tokens, workers
