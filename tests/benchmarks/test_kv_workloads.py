"""The workloads are the same for every policy, and the oracle counts what it says."""

from benchmarks.kv_routing import summary, table
from benchmarks.kv_workloads import QUICK, Request, oracle_share, workloads
from common.model_files import DEFAULT_MODEL
from common.text import TextModel, load_text_model

import pytest


@pytest.fixture(scope="module")
def text() -> TextModel:
    return load_text_model(DEFAULT_MODEL)


def requests(*prompts: list[int]) -> list[Request]:
    return [Request({}, tokens) for tokens in prompts]


@pytest.mark.parametrize(
    ("prompts", "share"),
    [
        # 8 tokens and again: of two blocks of 4, the second is never taken whole.
        ([list(range(8)), list(range(8))], 4 / 16),
        ([list(range(8)), list(range(9))], 8 / 17),
        # Equal tokens behind another beginning are another prefix.
        ([[1, 2, 3, 4, 5, 6, 7, 8, 9], [9, 2, 3, 4, 5, 6, 7, 8, 9]], 0),
        ([list(range(3)), list(range(3))], 0),
    ],
)
def test_the_oracle_has_every_full_block_it_saw_before(
    prompts: list[list[int]], share: float
) -> None:
    assert oracle_share(requests(*prompts), 4) == pytest.approx(share)


def test_a_seed_gives_the_same_requests(text: TextModel) -> None:
    first, again, other = (workloads(text, QUICK, seed) for seed in (1, 1, 2))
    assert [w.sessions for w in first] == [w.sessions for w in again]
    assert [w.sessions for w in first] != [w.sessions for w in other]


def test_two_workloads_have_reuse_and_one_has_none(text: TextModel) -> None:
    shares = {w.name: oracle_share(w.requests, 16) for w in workloads(text, QUICK, 1)}
    assert shares["multi-turn chats"] > 0.3
    assert shares["shared system prompts"] > 0.5
    assert shares["no reuse"] == 0


def test_a_conversation_goes_on_from_its_turn_before(text: TextModel) -> None:
    chats, *_ = workloads(text, QUICK, 1)
    for first, second in zip(chats.sessions[0], chats.sessions[0][1:], strict=False):
        length = len(first.tokens) // 16 * 16 - 16
        assert second.tokens[:length] == first.tokens[:length]


def test_the_table_has_every_policy_of_every_workload() -> None:
    run = {"ttft_p50_ms": 10.0, "ttft_p95_ms": 20.0, "cached_share": 0.5, "balance": 1.0}
    found = {
        ("chats", "random"): [run | {"tokens_per_s": 1.0}] * 3,
        ("chats", "kv"): [run | {"tokens_per_s": 2.0, "ttft_p50_ms": 5.0}] * 3,
        ("chats", "oracle"): [{"cached_share": 0.625}] * 3,
    }
    result = summary(found, ("random", "kv"))
    kv = result[0]["policies"][1]
    assert (kv["ttft_p50_ms"], kv["oracle_share"], kv["of_oracle"]) == (5.0, 0.625, 0.8)
    assert "| chats | random | 10 (10-10) | 20 (20-20) | 0.500 | 0.800 |" in table(result)
