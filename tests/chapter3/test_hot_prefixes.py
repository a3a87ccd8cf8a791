"""The prefixes that prompts share: found where branches part, bounded, forgotten in time."""

import random

from chapter3.decision import Decision
from chapter3.decision_log import DecisionLog
from chapter3.hot_prefixes import HALF_LIFE_S, MAX_NODES, MAX_PROMPT_BLOCKS, SHOWN, HotPrefixes
from chapter3.index import KvIndex
from chapter3.scoring import Scored
from chapter3.snapshot import RequestView, Snapshot, WorkerView
from common.kv import BlockStored, block_hashes

from dynamo.llm import compute_block_hash_for_seq

SIZE = 4


def tokens(text: str, blocks: int) -> list[int]:
    """The tokens of so many blocks, others for another text."""
    rng = random.Random(text)
    return [rng.randrange(50_000) for _ in range(blocks * SIZE)]


def add(log: DecisionLog, prompt: list[int]) -> None:
    hashes = compute_block_hash_for_seq(prompt, SIZE)
    view = WorkerView(1, 0, SIZE, len(prompt) / SIZE, 0)
    snapshot = Snapshot(RequestView(len(prompt)), (view,), float(log.decided))  # all are kept
    log.add("", Decision(snapshot, [Scored(0.0, {})], 0, "", tokens_hashes=hashes))


def counted(log: DecisionLog, now: float = 0.0) -> HotPrefixes:
    prefixes = HotPrefixes()
    prefixes.count(log.recent, now)
    return prefixes


def test_a_shared_prefix_and_its_branches() -> None:
    log = DecisionLog()
    system, chat = tokens("system", 8), tokens("chat", 5)
    for user in range(6):
        add(log, system + tokens(f"user {user}", 3))
    for user in range(4):
        add(log, system + chat + tokens(f"chatter {user}", 3))
    shown = counted(log).hottest(KvIndex(), {})
    assert [(prefix.blocks, prefix.tokens, prefix.level) for prefix in shown] == [
        (8, 8 * SIZE, 0),
        (13, 13 * SIZE, 1),
    ]
    assert [round(prefix.share, 2) for prefix in shown] == [1.0, 0.4]


def test_prompts_that_share_nothing_are_not_hot() -> None:
    log = DecisionLog()
    for user in range(50):
        add(log, tokens(f"user {user}", 10))
    assert counted(log).hottest(KvIndex(), {}) == []


def test_which_workers_have_it() -> None:
    log = DecisionLog()
    prompt = tokens("system", 4)
    add(log, prompt)
    add(log, prompt)
    index = KvIndex()
    index.apply(11, [BlockStored(block_hashes(prompt, SIZE), None, prompt, SIZE)])
    half = prompt[: 2 * SIZE]
    index.apply(12, [BlockStored(block_hashes(half, SIZE), None, half, SIZE)])
    (shown,) = counted(log).hottest(index, {11: 1, 12: 2})
    assert shown.workers == [1]


def test_what_was_hot_is_forgotten() -> None:
    log = DecisionLog()
    for _ in range(10):
        add(log, tokens("old", 5))
    prefixes = counted(log)
    assert prefixes.hottest(KvIndex(), {})
    prefixes.count(log.recent, HALF_LIFE_S * 4)
    assert prefixes.hottest(KvIndex(), {}) == []


def test_each_decision_counts_once() -> None:
    log = DecisionLog()
    add(log, tokens("once", 5))
    prefixes = counted(log)
    for _ in range(5):
        prefixes.count(log.recent, 0.0)
    assert prefixes.prompts == 1


def test_long_and_many_prompts_take_bounded_memory() -> None:
    log = DecisionLog()
    prefixes = HotPrefixes()
    add(log, tokens("long", MAX_PROMPT_BLOCKS + 100))
    prefixes.count(log.recent, 0.0)
    assert len(prefixes.nodes) == MAX_PROMPT_BLOCKS
    system = tokens("system", 10)
    for user in range(60):
        add(log, system + tokens(f"user {user}", 700))
        prefixes.count(log.recent, 0.0)
    assert len(prefixes.nodes) <= MAX_NODES
    (shown,) = prefixes.hottest(KvIndex(), {})
    assert shown.blocks == 10


def test_only_so_many_are_shown() -> None:
    log = DecisionLog()
    for number in range(3 * SHOWN):
        for _ in range(2):
            add(log, tokens(f"system {number}", 4))
    assert len(counted(log).hottest(KvIndex(), {})) == SHOWN
