"""All parts of the grading of a policy, each in a process of its own, one a core at a time."""

import asyncio
import itertools
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.grade_job import Job, Result
from benchmarks.grade_marks import DECISION_US, Results
from benchmarks.grade_workloads import GRADED
from launch.children import Children

import msgspec

REFERENCES = ("random", "least_loaded", "kv", "earliest_start")
PARTS = 3 + (len(REFERENCES) + 2) * len(GRADED)
LIMIT_S = 40.0
DECISIONS = 20_000
CHURN_S = 15.0
TRACED = 3.0  # times slower while memory is traced
HOPELESS = 5.0  # times the allowed time of a decision: not worth the wait for the rest


class UnusableError(Exception):
    """There is no such policy."""


class FaultyError(Exception):
    """The policy does not work."""


@dataclass(frozen=True)
class Graded:
    """All that was measured: of the policy, of the built-in ones and of the oracle."""

    own: Results
    references: dict[str, Results]
    oracle: Results
    kept_bytes: float
    repeatable: bool


class Jobs:
    """Runs jobs in `children`; `progress` hears how many are done, in the end `PARTS`."""

    def __init__(
        self, children: Children, progress: Callable[[int], None], limit_s: float = LIMIT_S
    ) -> None:
        self._children = children
        self._progress = progress
        self._limit_s = limit_s
        self._cores = asyncio.Semaphore(len(os.sched_getaffinity(0)))
        self._seeds = itertools.count(1)
        self._done = 0

    async def run(self, jobs: Sequence[Job]) -> list[Result]:
        """The results, in the jobs' order.

        Raises:
            UnusableError: there is no such policy.
            FaultyError: one of them did not end well.
        """
        tasks = [asyncio.ensure_future(self._run(job)) for job in jobs]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, job: Job) -> Result:
        async with self._cores:
            result = await self._result(job)
        if result.unusable:
            raise UnusableError(result.unusable)
        if result.error:
            raise FaultyError(result.error)
        self._done += 1
        self._progress(self._done)
        return result

    async def _result(self, job: Job) -> Result:
        path = self._children.new_path("result")
        command = [sys.executable, "-m", "benchmarks.grade_job", msgspec.json.encode(job).decode()]
        # A set of strings has another order in each process, unless told not to.
        environment = {"PYTHONHASHSEED": str(next(self._seeds))}
        child = self._children.start(job.kind, [*command, path], environment)
        try:
            status = await child.wait(self._limit_s)
        except TimeoutError:
            return Result(
                error=f"it had not ended after {self._limit_s:g} s: a decision never ends, or they "
                "take longer and longer"
            )
        finally:
            child.kill()
            await child.wait()
        if path.exists():
            return msgspec.json.decode(path.read_bytes(), type=Result)
        how = f"status {status}" if status >= 0 else signal.Signals(-status).name
        return Result(error=f"it ended its process ({how})")


async def measure(
    jobs: Jobs, policy: str, seed: int, requests: int, decisions: int = DECISIONS
) -> Graded:
    """Grade the policy.

    Raises:
        UnusableError: there is no such policy.
        FaultyError: it does not work.
    """
    checks = await jobs.run([Job("check", policy, seed)] * 2)
    decision_us = max(check.decision_us for check in checks)
    if decision_us > HOPELESS * DECISION_US:
        raise FaultyError(
            f"a decision takes {decision_us / 1e3:.0f} ms; {DECISION_US / 1e3:g} ms are allowed"
        )
    churned_decisions = min(decisions, round(CHURN_S * 1e6 / (TRACED * max(decision_us, 1.0))))
    runs: list[tuple[Literal["replay", "oracle"], str]] = [
        *(("replay", name) for name in (policy, *REFERENCES)),
        ("oracle", ""),
    ]
    replays = [
        Job(kind, name, seed, requests, workload) for kind, name in runs for workload in GRADED
    ]
    churned, *results = await jobs.run([Job("churn", policy, seed, churned_decisions), *replays])
    found = [
        dict(zip(GRADED, results[first : first + len(GRADED)], strict=True))
        for first in range(0, len(results), len(GRADED))
    ]
    return Graded(
        own=found[0],
        references=dict(zip(REFERENCES, found[1:-1], strict=True)),
        oracle=found[-1],
        kept_bytes=churned.kept_bytes,
        repeatable=checks[0].routed == checks[1].routed,
    )


async def grade(policy: str, seed: int, requests: int, progress: Callable[[int], None]) -> Graded:
    """`measure` with processes that all end with it."""
    with Children() as children:
        return await measure(Jobs(children, progress), policy, seed, requests)
