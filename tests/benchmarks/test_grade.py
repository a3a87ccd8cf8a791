"""`scripts/grade`: what costs points, what a broken policy is told, and that nothing is left."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import grade, grade_jobs
from benchmarks.grade_churn import churn
from benchmarks.grade_job import Job, Result, run
from benchmarks.grade_jobs import FaultyError, Graded, Jobs, UnusableError
from benchmarks.grade_marks import (
    DECISION,
    FAIRNESS,
    HIT_RATE,
    KEPT_BYTES,
    MEMORY,
    TTFT_P50,
    Criterion,
    marks,
)
from benchmarks.grade_workloads import GRADED, graded_trace
from chapter3.policies import least_loaded
from chapter3.scoring import PolicyError
from chapter3.snapshot import Score, Snapshot
from launch.children import Children
from tests.project_files import ROOT

import psutil
import pytest

EXERCISE = ROOT / "chapter3" / "exercises" / "my_policy.py"
GOOD = "[{'a': -w.prefill_s} for w in snapshot.workers]"


@pytest.fixture
def policy_file(tmp_path: Path) -> Callable[[str], str]:
    """Write a file in which `policy` has this body; what names it."""

    def write(body: str) -> str:
        lines = "\n    ".join(body.splitlines())
        imports = "import os, random, sys, time\nseen = {}\n"
        path = tmp_path / "mine.py"
        path.write_text(f"{imports}\n\ndef policy(snapshot):\n    {lines}\n")
        return f"{path}:policy"

    return write


def results(p50: float = 100.0, hit_rate: float = 0.8, **slowdowns: float) -> dict[str, Result]:
    """The same figures in every workload."""
    return {
        workload: Result(
            ttft_p50_ms=p50,
            ttft_p95_ms=1000.0,
            hit_rate=hit_rate,
            slowdowns=slowdowns or {"shop": 0.5, "club": 0.5},
            decision_us=20.0,
        )
        for workload in GRADED
    }


@pytest.mark.parametrize(
    ("criterion", "value", "points"),
    [
        (TTFT_P50, 0.7, 20),
        (TTFT_P50, 1.0, 20),
        (TTFT_P50, 2.0, 10),
        (TTFT_P50, 4.0, 0),
        (TTFT_P50, 90.0, 0),
        (HIT_RATE, 1.1, 20),
        (HIT_RATE, 0.98, 20),
        (HIT_RATE, 0.6, 0),
        (HIT_RATE, 0.0, 0),
        (MEMORY, 0.0, 10),
        (MEMORY, 4.1, 0),
        (DECISION, 999.0, 10),
        (DECISION, 1001.0, 0),
    ],
)
def test_points(criterion: Criterion, value: float, points: float) -> None:
    assert criterion.points_for(value) == pytest.approx(points, abs=1e-9)


def test_as_good_as_the_best_built_in_is_an_a() -> None:
    built_ins = [results(), results(p50=300.0)]
    found = marks(results(), built_ins, results())
    assert (found.total, found.grade, found.passed) == (100, "A", True)


def test_who_keeps_everything_does_not_pass_however_fast() -> None:
    found = marks(results(), [results()], results(), kept_bytes=100.0)
    assert (found.total, found.grade, found.passed) == (90, "D", False)


def test_who_sacrifices_a_tenant_loses_marks_for_fairness_and_is_told_which() -> None:
    """Medians and hit rate are as before: one small tenant alone waits."""
    own, built_in = results(shop=0.5, club=50.0), results()
    found = marks(own, [built_in], built_in)
    assert found.points[FAIRNESS.name] == 0
    assert not found.passed
    graded = Graded(own, {"kv": built_in}, built_in, kept_bytes=0.0, repeatable=True)
    (line,) = grade.advice(graded, found)
    assert FAIRNESS.name in line
    assert "tenant 'club'" in line


def test_there_is_advice_for_each_criterion_that_went_badly() -> None:
    own, best = results(p50=500.0, hit_rate=0.2), results()
    graded = Graded(own, {"kv": best}, best, kept_bytes=100.0, repeatable=False)
    lines = grade.advice(graded, grade.all_marks(graded)["yours"])
    assert [line.split(":")[0] for line in lines] == [
        TTFT_P50.name,
        HIT_RATE.name,
        MEMORY.name,
        "Not repeatable",
    ]


@pytest.mark.parametrize("name", GRADED)
def test_workloads_are_drawn_by_the_seed_and_tenants_share_nothing(name: str) -> None:
    trace = graded_trace(name, 1, 300)
    assert trace == graded_trace(name, 1, 300)
    assert trace != graded_trace(name, 2, 300)
    blocks: dict[str, set[int]] = {}
    for request in trace:
        blocks.setdefault(request.tenant, set()).update(request.hash_ids)
    assert set(blocks) == {tenant.name for tenant in GRADED[name].tenants}
    assert len(set.union(*blocks.values())) == sum(map(len, blocks.values()))
    for tenant in GRADED[name].tenants:
        made = sum(1 for request in trace if request.tenant == tenant.name)
        assert made == pytest.approx(300 * tenant.share, abs=1)


def test_churn_finds_what_is_kept_for_ever() -> None:
    seen: dict[str, float] = {}

    def remembers(snapshot: Snapshot) -> list[dict[str, float]]:
        seen[snapshot.request.session] = snapshot.now
        return least_loaded.policy(snapshot)

    assert churn(remembers, 1, 2000) > 10 * KEPT_BYTES


def test_churn_allows_a_bounded_memory() -> None:
    seen: dict[str, float] = {}

    def remembers_some(snapshot: Snapshot) -> list[dict[str, float]]:
        seen[snapshot.request.session] = snapshot.now
        if len(seen) > 200:
            del seen[next(iter(seen))]
        return least_loaded.policy(snapshot)

    assert churn(remembers_some, 1, 2000) <= KEPT_BYTES


def test_churn_replaces_engines() -> None:
    known = set(range(9))

    def knows_its_engines(snapshot: Snapshot) -> list[Score]:
        assert {worker.instance_id for worker in snapshot.workers} <= known
        return [0.0] * len(snapshot.workers)

    with pytest.raises(PolicyError, match="AssertionError"):
        churn(knows_its_engines, 1, 1000)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("return [1 / 0]", "with one engine, the policy failed: ZeroDivisionError"),
        ("return [1.0]", "with 4 engines, the policy returned 1 scores for"),
        ("return [float('nan')] * len(snapshot.workers)", "is no score"),
        ("snapshot.request.tenant = 'x'", "FrozenInstanceError"),
        (
            f"object.__setattr__(snapshot.workers[0], 'running', 9)\nreturn {GOOD}",
            "it changed the snapshot",
        ),
        ("assert len(snapshot.workers) != 3, 'late'\nreturn " + GOOD, "with 4 engines"),
    ],
)
def test_what_a_broken_policy_is_told(
    policy_file: Callable[[str], str], body: str, error: str
) -> None:
    assert error in run(Job("check", policy_file(body), seed=1)).error


def test_a_good_policy_is_checked_with_engines_that_differ_and_one_that_comes_late(
    policy_file: Callable[[str], str],
) -> None:
    result = run(Job("check", policy_file(f"return {GOOD}"), seed=1))
    assert not result.error
    assert set(result.routed) == {0, 1, 2, 3}
    assert result.decision_us > 0


def test_a_policy_that_waits_is_slow_though_it_computes_little(
    policy_file: Callable[[str], str],
) -> None:
    result = run(Job("check", policy_file(f"time.sleep(0.002)\nreturn {GOOD}"), seed=1))
    assert result.decision_us >= 2000


def measure_in_children(policy: str, limit_s: float) -> Graded:
    """A small grading, in processes of its own, of which none is left."""

    async def measured() -> Graded:
        with Children() as children:
            jobs = Jobs(children, lambda done: None, limit_s)
            return await grade_jobs.measure(jobs, policy, seed=1, requests=100, decisions=3000)

    before = set(psutil.Process().children(recursive=True))
    try:
        return asyncio.run(measured())
    finally:
        assert set(psutil.Process().children(recursive=True)) <= before


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("while True: pass", "it had not ended after 3 s"),
        ("time.sleep(1e6)", "it had not ended after 3 s"),
        ("os._exit(3)", r"it ended its process \(status 3\)"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("time.sleep(0.006)\nreturn " + GOOD, r"a decision takes \d+ ms; 1 ms are allowed"),
    ],
)
def test_a_policy_that_cannot_be_graded_is_ended_and_told_why(
    policy_file: Callable[[str], str], body: str, error: str
) -> None:
    limit_s = 3.0 if "3 s" in error else 60.0
    with pytest.raises(FaultyError, match=error):
        measure_in_children(policy_file(body), limit_s)


def test_a_policy_is_measured_beside_the_built_in_ones(policy_file: Callable[[str], str]) -> None:
    """Prints, threads and processes of its own do no harm; chance without the seed is noticed."""
    body = """
print('x' * 1000, file=sys.stderr)
return [random.random() for _ in snapshot.workers]"""
    graded = measure_in_children(policy_file(body), 100.0)
    assert not graded.repeatable
    found = grade.all_marks(graded)
    assert list(found) == ["yours", "random", "least_loaded", "kv", "earliest_start", "oracle"]
    assert found["random"].total < found["kv"].total
    assert found["random"].total < found["earliest_start"].total


def script(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "benchmarks.grade", *map(str, arguments)]


@pytest.mark.parametrize(
    ("policy", "error"),
    [
        ("nobody", "there is no policy 'nobody'; give path.py:function or one of dynamo, "),
        ("oracle", "there is no policy 'oracle'"),
        ("missing.py:policy", "there is no file missing.py"),
        (f"{EXERCISE}:nothing", "has no function 'nothing'"),
    ],
)
def test_a_policy_that_is_not_there_is_a_usage_error(policy: str, error: str) -> None:
    async def measured() -> None:
        with Children() as children:
            jobs = Jobs(children, lambda done: None)
            await grade_jobs.measure(jobs, policy, seed=1, requests=100)

    with pytest.raises(UnusableError, match=error):
        asyncio.run(measured())


def test_the_script_grades_the_exercise(tmp_path: Path) -> None:
    """As it is, it fails, and is told how to become better."""
    made = tmp_path / "grade.json"
    command = ["scripts/grade", f"{EXERCISE}:policy", "--seed", "7", "--requests", "200"]
    done = subprocess.run(
        [*command, "--json", str(made)], capture_output=True, text=True, cwd=ROOT, timeout=100
    )
    assert done.returncode == 1, done.stderr
    assert "grade F" in done.stdout
    assert "see overlap_blocks" in done.stdout
    assert "To repeat this: --seed 7" in done.stdout
    result = json.loads(made.read_text())
    assert (result["seeds"], result["kind"], result["passed"]) == ([7], "simulated", False)
    yours, *_, ours, _ = result["policies"]
    assert (yours["name"], yours["grade"]) == ("yours", "F")
    assert (ours["name"], ours["grade"]) == ("earliest_start", "A")


def test_the_script_refuses_what_is_no_policy() -> None:
    done = subprocess.run(script("nobody"), capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no policy 'nobody'")


def test_ctrl_c_ends_the_grading_and_all_its_processes(
    policy_file: Callable[[str], str], tmp_path: Path
) -> None:
    pids = tmp_path / "pids"
    os.mkfifo(pids)
    body = f"print(os.getpid(), file=open({str(pids)!r}, 'w'), flush=True)\ntime.sleep(1e6)"
    command = script(policy_file(body))
    with (
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process,
        pids.open() as pipe,
    ):
        pid = int(pipe.readline())
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "interrupted\n")
    assert not psutil.pid_exists(pid)
