"""`benchmarks.agent`: the same work for all policies, an honest oracle, no ratio of faulty runs."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import agent
from benchmarks.agent_run import Contender, Run, contender
from benchmarks.agent_workload import (
    Size,
    Step,
    crowd,
    crowd_per_s,
    oracle_share,
    workload,
)
from common.model_files import DEFAULT_MODEL
from common.protocol_routing import RoutingHints
from common.text import TextModel, load_text_model
from tests.project_files import ROOT

import pytest

SIZES = [agent.FULL, agent.QUICK, agent.SIMULATED_FULL, agent.SIMULATED_QUICK]


@pytest.fixture(scope="module")
def text() -> TextModel:
    return load_text_model(DEFAULT_MODEL)


def test_a_seed_gives_the_same_tasks_and_the_same_crowd(text: TextModel) -> None:
    first, again, other = (workload(text, agent.FULL, seed, 1.0) for seed in (1, 1, 2))
    assert first == again
    assert first.agents != other.agents
    some, same = (list(itertools.islice(crowd(text, first), 5)) for _ in range(2))
    assert some == same
    assert some != list(itertools.islice(crowd(text, other), 5))


@pytest.mark.parametrize("size", SIZES)
def test_all_seeds_have_as_many_steps_and_a_step_continues_the_one_before(
    text: TextModel, size: Size
) -> None:
    for seed in (1, 2):
        load = workload(text, size, seed, 1.0)
        tasks = [task for one in load.agents for task in one]
        counts = sorted(len(task) for task in tasks)
        assert (counts[0], counts[-1]) == size.steps
        for task in tasks:
            for before, after in itertools.pairwise(task):
                assert after.tokens[: len(before.tokens)] == before.tokens
                assert before.hints.agent_state == "calling"
                assert size.tool_s[0] <= before.tool_s <= size.tool_s[1]
            assert [step.hints.step for step in task] == list(range(1, len(task) + 1))
            assert task[-1].hints.agent_state == "answering"
            assert task[-1].hints.next_turn_s is None
    assert counts == sorted(
        len(task) for one in workload(text, size, 3, 1.0).agents for task in one
    )


def test_all_agents_begin_alike_and_go_on_differently(text: TextModel) -> None:
    load = workload(text, agent.FULL, 1, 1.0)
    firsts = [task[0].tokens for one in load.agents for task in one]
    assert len({tuple(tokens[: agent.FULL.system]) for tokens in firsts}) == 1
    assert len({tuple(tokens) for tokens in firsts}) == len(firsts)


def test_the_crowd_is_as_large_as_the_engines_are_fast() -> None:
    """A share of 300 tokens a second is for prompts of 256 tokens."""
    share = agent.FULL.crowd_share
    assert crowd_per_s(agent.FULL, 300.0) == pytest.approx(share * 300 / 256)


def test_all_seeds_have_as_large_a_crowd(text: TextModel) -> None:
    for seed in (1, 2):
        load = workload(text, agent.FULL, seed, 2.0)
        questions = list(itertools.islice(crowd(text, load), 80))
        times = list(itertools.accumulate(question.after_s for question in questions))
        assert min(question.after_s for question in questions) >= 0
        assert [int(at_s // 4.0) for at_s in times] == [number // 8 for number in range(80)]


def test_half_of_the_caches_is_room_for_all_sessions_and_the_crowd_needs_the_rest() -> None:
    """What the description says of the load."""
    for engines, size in ((agent.REAL, agent.FULL), (agent.SIMULATED, agent.SIMULATED_FULL)):
        turn = size.said + sum(size.returned) / 2
        mean = sum(size.task) / 2 + turn * sum(size.steps) / 2 / 2
        retained = engines.count * size.system + size.agents * mean
        assert 0.4 < retained / (engines.count * engines.cache_tokens / 2) < 1.0


def test_the_oracle_has_what_any_step_had_before() -> None:
    def step(*tokens: int) -> Step:
        return Step(list(tokens), 1, RoutingHints(), 0.0)

    a, b = range(4), range(4, 8)
    assert oracle_share([step(*a, 9), step(*a, *b, 9)], 4) == 4 / 14
    assert oracle_share([step(*a, *b), step(*a, *b)], 4) == 4 / 16  # one token is left to compute
    assert oracle_share([step(*a, 9), step(*b, *a, 9)], 4) == 0


def test_agents_give_hints_to_the_policy_that_is_made_for_them() -> None:
    assert contender("agent") == Contender("agent", True)
    assert contender("earliest_start") == Contender("earliest_start", False)
    assert contender("kv+hints") == Contender("kv", True)
    for name in ("agent", "earliest_start", "kv+hints"):
        assert contender(name).name == name


def a_run(task_p50_s: float, *faults: str) -> Run:
    figures = {"task_p50_s": task_p50_s, "cached_share": 0.6, "task_p95_s": 1.0}
    figures |= {"ttft_p50_ms": 1.0, "ttft_p95_ms": 1.0}
    figures |= {"crowd_ttft_p50_ms": 1.0, "crowd_ttft_p95_ms": 1.0}
    return Run(figures, list(faults))


def test_seeds_are_compared_with_themselves() -> None:
    """The machine's speed drifts: medians of one and the other could be of different seeds."""
    found = {
        "earliest_start": [a_run(10.0), a_run(20.0), a_run(40.0)],
        "agent": [a_run(9.0), a_run(16.0), a_run(20.0)],
    }
    rows = agent.summary(found, [0.6, 0.8, 0.6])
    assert agent.ratio(rows) == pytest.approx(0.8)
    assert [row["task_p50_s"] for row in rows] == [20.0, 16.0]
    assert rows[1]["of_oracle"] == 1.0
    assert "task p50: 0.800 of earliest_start's" in agent.verdict(rows)


def test_a_faulty_run_is_not_compared() -> None:
    found = {"earliest_start": [a_run(10.0)], "agent": [a_run(5.0, "engines are not alike")]}
    rows = agent.summary(found, [0.6])
    assert agent.ratio(rows) is None
    assert agent.verdict(rows) == "no comparison: agent: engines are not alike"


LITTLE = """
from dataclasses import replace
from benchmarks import agent
agent.SIMULATED = replace(agent.SIMULATED, count=2, cache_tokens=4096)
agent.SIMULATED_QUICK = replace(
    agent.FULL, agents=2, steps=(2, 3), tool_s=(0.5, 1.0), alone_s=0.5, crowd_share=0.1
)
agent.main()
"""


def test_it_runs(tmp_path: Path) -> None:
    """With little of everything; whether that is a fair comparison is not the point."""
    file = tmp_path / "agent.json"
    command = [sys.executable, "-c", LITTLE, "--quick", "--simulated", "--json", str(file)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert file.exists(), done.stderr
    document: dict[str, Any] = json.loads(file.read_text())
    # A busy machine makes engines unequal.
    assert done.returncode == (1 if document["ratio"] is None else 0), done.stderr
    assert document["kind"] == "simulated"
    assert [row["name"] for row in document["policies"]] == ["earliest_start", "agent"]
    for row in document["policies"]:
        assert row["task_p50_s"] > 0.5
        assert row["steps"] == 5
        assert 0 < row["cached_share"] <= row["oracle_share"]
    assert document["policies"][1]["retained_blocks"] > 0
    assert "the crowd's TTFT" in done.stdout
