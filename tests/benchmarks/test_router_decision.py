"""The comparison of routers: that it feeds everyone the same and refuses what shows nothing."""

import asyncio
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

from benchmarks.report import GuardError
from benchmarks.router_contenders import check
from benchmarks.router_decision import measure_in_process, row, table
from benchmarks.router_fleet import BLOCK_SIZE, PROMPT_TOKENS, Fleet, add_engines, evict, fill
from chapter2.selector import Selector

import pytest
from dynamo.llm import compute_block_hash_for_seq

WHO = {
    "select",
    "find_worker",
    "RadixTree.find_matches",
    "KvRouter.best_worker",
    "SelectionService.select",
}


def test_the_fleet_has_as_many_blocks_as_it_says() -> None:
    fleet = Fleet(workers=7, blocks=3000)
    selector = Selector("kv", seed=0)
    fill(selector, fleet)
    held = [selector.index.block_count(instance) for instance in fleet.instances]
    assert sum(held) == 3000
    assert max(held) - min(held) <= 1
    evict(selector, fleet)
    assert [selector.index.block_count(instance) for instance in fleet.instances] == [0] * 7


def test_half_of_the_prompts_begin_like_what_is_cached() -> None:
    fleet = Fleet(workers=4, blocks=4000)
    selector = Selector("kv", seed=0)
    fill(selector, fleet)
    prompts = list(fleet.prompts("seed", 400))
    assert {len(prompt) for prompt in prompts} == {PROMPT_TOKENS}
    hashes = [compute_block_hash_for_seq(prompt, BLOCK_SIZE) for prompt in prompts]
    known = sum(1 for h in hashes if selector.index.overlaps(h))
    assert 160 <= known <= 240
    assert prompts == list(Fleet(workers=4, blocks=4000).prompts("seed", 400))
    assert prompts != list(fleet.prompts("another seed", 400))


def test_the_selector_may_choose_every_engine_of_the_fleet() -> None:
    fleet = Fleet(workers=3, blocks=300)
    selector = Selector("round_robin", seed=0)
    reports = add_engines(selector, fleet)
    for _ in fleet.instances:
        next(reports)
    chosen = {selector.select([1], "a-model").instance_id for _ in range(3)}
    assert chosen == set(fleet.instances)


def test_refuses_a_choice_that_is_no_engine() -> None:
    with pytest.raises(GuardError, match="nobody chose"):
        check("nobody", Fleet(2, 100), [({1}, 3), ({3}, 0)])


def test_refuses_when_no_event_was_applied() -> None:
    with pytest.raises(GuardError, match="no event was applied"):
        check("nobody", Fleet(2, 100), [({1}, 0), (set(), 0)])


def test_refuses_when_blocks_stay_after_their_removal(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(2, 100)
    selector = Selector("kv", seed=0)
    fill(selector, fleet)
    monkeypatch.setattr(selector.index, "_remove", lambda *_: [])
    with pytest.raises(GuardError, match="100 blocks are left"):
        evict(selector, fleet)


async def test_everyone_decides_on_a_small_fleet(
    servers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both peers are there, so a table without them says that something broke."""
    for name, value in servers.items():
        monkeypatch.setenv(name, value)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        measured = await asyncio.get_running_loop().run_in_executor(
            pool, measure_in_process, 4, 2000, [0, 1, 2], 100
        )
    assert measured.left_out == {}
    assert set(measured.seconds) == WHO
    for who, rounds in measured.seconds.items():
        assert [len(seconds) for seconds in rounds] == [100, 100], who
        entry = row(measured.memory, who, rounds)
        assert entry["workers"] == 4
        assert entry["blocks"] == 2000
        assert entry["who"] == who
        assert entry["decisions_per_s"] > 0
        assert 0 < entry["p50_us"] <= entry["p99_us"]
        assert f"| 4 | 2,000 | {who} |" in table([entry])
    assert measured.memory.stored_us_per_block > 0
    assert measured.memory.removed_us_per_block > 0
