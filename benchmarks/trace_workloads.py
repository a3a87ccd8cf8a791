"""Traces made by hand, for who has no recorded one, and so that no policy is made for one alone.

- `chats`: conversations of several turns, each prompt the one before, its answer and more;
- `documents`: many questions about few long documents, some asked in bursts;
- `mixed`: short questions beside prompts of up to 100,000 tokens that nobody shares.
"""

import itertools
import random
from collections.abc import Callable, Iterator

from benchmarks.trace import BLOCK_SIZE, TraceRequest

Ids = Iterator[int]


def blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK_SIZE)


def request(
    arrived_s: float, tokens: int, output: int, shared: list[int], ids: Ids, session: str = ""
) -> TraceRequest:
    """A request that begins with shared blocks; the others are its own."""
    missing = blocks_for(tokens) - len(shared)
    own = [next(ids) for _ in range(missing)]
    blocks = [*shared, *own][: blocks_for(tokens)]
    return TraceRequest(arrived_s * 1e3, tokens, output, blocks, session=session)


def chats(rng: random.Random, count: int, seconds: float) -> Iterator[TraceRequest]:
    ids = itertools.count()
    systems = [[next(ids) for _ in range(4)] for _ in range(8)]
    made = 0
    while made < count:
        shared = rng.choice(systems)
        tokens = len(shared) * BLOCK_SIZE
        arrived = rng.uniform(0, seconds)
        session = f"chat {made}"
        for _ in range(min(rng.randint(1, 12), count - made)):
            tokens += round(rng.lognormvariate(6.5, 1.0)) + 1
            output = min(round(rng.lognormvariate(4.5, 0.8)) + 1, 1000)
            turn = request(arrived, tokens, output, shared, ids, session)
            yield turn
            made += 1
            shared = turn.full_blocks
            tokens += output
            arrived += output * 0.03 + rng.expovariate(1 / 15)


def documents(rng: random.Random, count: int, seconds: float) -> Iterator[TraceRequest]:
    ids = itertools.count()
    texts = [[next(ids) for _ in range(rng.randint(10, 60))] for _ in range(60)]
    made = 0
    while made < count:
        text = texts[min(int(rng.paretovariate(0.8)) - 1, len(texts) - 1)]
        arrived = rng.uniform(0, seconds)
        burst = rng.randint(10, 30) if rng.random() < 0.03 else 1
        for _ in range(min(burst, count - made)):
            tokens = len(text) * BLOCK_SIZE + rng.randint(20, 800)
            yield request(arrived, tokens, rng.randint(20, 300), text, ids)
            made += 1
            arrived += rng.expovariate(2.0)


def mixed(rng: random.Random, count: int, seconds: float) -> Iterator[TraceRequest]:
    ids = itertools.count()
    systems = [[next(ids) for _ in range(2)] for _ in range(4)]
    for _ in range(count):
        arrived = rng.uniform(0, seconds)
        if rng.random() < 0.8:
            tokens = 2 * BLOCK_SIZE + rng.randint(20, 1500)
            yield request(arrived, tokens, rng.randint(20, 400), rng.choice(systems), ids)
        else:
            tokens = min(round(rng.lognormvariate(9.6, 0.8)), 100_000)
            yield request(arrived, tokens, rng.randint(20, 200), [], ids)


WORKLOADS: dict[str, Callable[[random.Random, int, float], Iterator[TraceRequest]]] = {
    "chats": chats,
    "documents": documents,
    "mixed": mixed,
}


def workload(name: str, seed: int, count: int, seconds: float) -> list[TraceRequest]:
    """`count` requests that begin within about `seconds`, in the order of their arrival."""
    rng = random.Random(f"{name}/{seed}")
    return sorted(WORKLOADS[name](rng, count, seconds), key=lambda made: made.timestamp)
