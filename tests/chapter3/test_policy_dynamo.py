"""Dynamo's cost: the numbers of its documents, and what its own routers say.

The routers run in processes of their own, as their runtime allows no second one beside it.
"""

import asyncio
import math
import multiprocessing
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

from chapter3.policies import dynamo
from chapter3.scoring import best, scored
from chapter3.snapshot import RequestView, Snapshot, WorkerView
from tests.chapter3.dynamo_peers import (
    ENGINES,
    Compared,
    draws,
    live_with_kv_router,
    live_with_selection_service,
)

import pytest

T = TypeVar("T")
REQUESTS = 300


def worker(
    number: int,
    *,
    prompt_blocks: float = 10,
    cached: int = 0,
    decode: int = 0,
    new: int = 0,
    prefill_tokens: int = 0,
) -> WorkerView:
    return WorkerView(
        number,
        number,
        16,
        prompt_blocks,
        cached,
        active_prompt_blocks=decode - new,
        new_prompt_blocks=new,
        prefill_tokens=prefill_tokens,
    )


def decided(*workers: WorkerView, seed: int = 0) -> tuple[list[float], int]:
    """The costs, and who is chosen."""
    snapshot = Snapshot(RequestView(160), workers, 0.0, seed)
    scores = scored(dynamo.policy, snapshot)
    return [-score.total for score in scores], workers[best(scores, snapshot)].worker_id


def test_the_example_of_the_documents() -> None:
    """A prompt of 10 blocks; 2, 5 and 8 are cached, 10, 5 and 9 will decode.

    Source: the example under "Worker Selection" of Dynamo's "Routing Concepts"; it is the same
    in its older "KV Router" pages.
    """
    workers = [
        worker(1, cached=2, decode=10),
        worker(2, cached=5, decode=5),
        worker(3, cached=8, decode=9),
    ]
    assert decided(*workers) == ([18.0, 10.0, 11.0], 2)


def test_a_greater_scale_of_prefill_favours_what_is_cached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The documents' example with twice the weight: 2 * 8 + 10, 2 * 5 + 5, 2 * 2 + 9."""
    monkeypatch.setattr(dynamo, "PREFILL_LOAD_SCALE", 2.0)
    workers = [
        worker(1, cached=2, decode=10),
        worker(2, cached=5, decode=5),
        worker(3, cached=8, decode=9),
    ]
    assert decided(*workers) == ([26.0, 15.0, 13.0], 3)


def test_prompts_under_way_count_and_what_is_cached_is_worth_no_more_than_the_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """24 tokens are one and a half blocks; a credit of 3 leaves no less than nothing to do."""
    assert decided(worker(1, cached=4, prefill_tokens=24, decode=6, new=6))[0] == [13.5]
    monkeypatch.setattr(dynamo, "OVERLAP_SCORE_CREDIT", 3.0)
    assert decided(worker(1, cached=4, prefill_tokens=24, decode=6, new=6))[0] == [6.0]


def test_each_term_is_named() -> None:
    snapshot = Snapshot(RequestView(160), (worker(1, cached=2, decode=10, new=3),), 0.0)
    assert dynamo.policy(snapshot) == [{"prefill": -8.0, "decode": -10.0}]


def test_equal_costs_are_drawn_evenly_and_one_engine_is_always_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dynamo, "TEMPERATURE", 0.3)
    assert decided(worker(1))[1] == 1
    drawn = Counter(decided(worker(1), worker(2), seed=seed)[1] for seed in range(2000))
    assert abs(drawn[1] - 1000) < 120


async def in_process(
    work: Callable[..., T], *arguments: Any, servers: dict[str, str], monkeypatch: Any
) -> T:
    for name, value in {**servers, "DYN_LOG": "error"}.items():
        monkeypatch.setenv(name, value)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return await asyncio.get_running_loop().run_in_executor(pool, work, *arguments)


@pytest.mark.parametrize("live", [live_with_kv_router, live_with_selection_service])
async def test_the_costs_and_the_choice_are_those_of_dynamos_own_router(
    live: Callable[[int, int], list[Compared]],
    servers: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared = await in_process(live, 1, REQUESTS, servers=servers, monkeypatch=monkeypatch)
    assert len(compared) == REQUESTS
    clear = 0
    for step in compared:
        assert len(step.ours) == ENGINES
        assert step.ours == pytest.approx(step.theirs)
        lowest, second = sorted(step.ours.values())[:2]
        if second > lowest:  # among equals Dynamo draws
            clear += 1
            assert step.chosen == min(step.ours, key=step.ours.__getitem__)
    assert clear > REQUESTS / 2
    assert len({step.chosen for step in compared}) == ENGINES


async def test_a_temperature_draws_as_often_as_dynamos_own_router(
    servers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The softmax of the costs, scaled so that the highest and the lowest are 1 apart."""
    temperature, count = 0.7, 4000
    monkeypatch.setenv("DYN_ROUTER_TEMPERATURE", str(temperature))
    costs, drawn = await in_process(draws, count, servers=servers, monkeypatch=monkeypatch)
    lowest, highest = min(costs.values()), max(costs.values())
    weights = {
        instance: math.exp(-(cost - lowest) / (highest - lowest) / temperature)
        for instance, cost in costs.items()
    }
    monkeypatch.setattr(dynamo, "TEMPERATURE", temperature)
    workers = [
        WorkerView(instance, instance, 16, cost, 0) for instance, cost in costs.items()
    ]  # whose only cost is the prompt
    ours = Counter(decided(*workers, seed=seed)[1] for seed in range(count))
    theirs = Counter(drawn)
    for instance, weight in weights.items():
        expected = weight / sum(weights.values())
        assert ours[instance] / count == pytest.approx(expected, abs=0.04)
        assert theirs[instance] / count == pytest.approx(expected, abs=0.04)
