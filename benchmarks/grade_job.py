"""One part of the grading of a policy, in a process of its own: `benchmarks.grade` starts it.

    python -m benchmarks.grade_job '{"kind": "replay", "policy": "kv", ...}' RESULT_FILE

What the policy prints goes nowhere, and what it costs or breaks ends with this process.
"""

import copy
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from benchmarks.grade_churn import churn
from benchmarks.grade_workloads import ENGINE, ENGINES, GRADED, graded_trace
from benchmarks.report import percentile
from benchmarks.trace_engine import Running, TraceEngine
from benchmarks.trace_replay import Oracle, Replay, Router, SelectorRouter, arrivals, replay
from chapter3.policy_loader import load_policy
from chapter3.scoring import PolicyError
from chapter3.snapshot import Policy, Score, Snapshot

import msgspec

MEMORY_BYTES = 3 * 2**30
CHECKED_REQUESTS = 150
CHECKED_SPEEDS = (1.0, 0.5, 2.0, 1.0)


class Job(msgspec.Struct, frozen=True):
    """`count` of requests in a replay or of the oracle, or of decisions in a churn."""

    kind: Literal["check", "replay", "churn", "oracle"]
    policy: str
    seed: int
    count: int = 0
    workload: str = ""


class Result(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What came of a job; only the fields of its kind are set.

    `unusable`: there is no such policy. `error`: what the policy did wrong. `slowdowns` are the
    tenants' means of TTFT over the time in which an idle engine computes the whole prompt.
    """

    unusable: str = ""
    error: str = ""
    ttft_p50_ms: float = 0.0
    ttft_p95_ms: float = 0.0
    hit_rate: float = 0.0
    slowdowns: dict[str, float] = {}
    decision_us: float = 0.0
    kept_bytes: float = 0.0
    routed: list[int] = []


class TimedPolicy:
    """A policy, and how long each decision took."""

    def __init__(self, policy: Policy, *, watched: bool) -> None:
        self._policy = policy
        self._watched = watched
        self._computing_ns: list[int] = []
        self._passed_ns: list[int] = []

    def __call__(self, snapshot: Snapshot) -> Sequence[Score]:
        before = copy.deepcopy(snapshot) if self._watched else snapshot
        passed, computing = time.perf_counter_ns(), time.thread_time_ns()
        scores = self._policy(snapshot)
        self._computing_ns.append(time.thread_time_ns() - computing)
        self._passed_ns.append(time.perf_counter_ns() - passed)
        if snapshot != before:
            raise ValueError("it changed the snapshot")
        return scores

    @property
    def decision_us(self) -> float:
        """The 99th percentile of the computing time, which other processes do not stretch.

        Half of the decisions took longer than what is returned if they wait rather than compute.
        """
        if not self._passed_ns:
            return 0.0
        return max(percentile(self._computing_ns, 0.99), percentile(self._passed_ns, 0.5)) / 1e3


class LateRouter(SelectorRouter):
    """Its last engine is there from half of the requests on."""

    def choose(self, running: Running, engines: Sequence[TraceEngine], now: float) -> int:
        late = self.selector.workers[len(engines) - 1]
        late.synced = len(engines) == 1 or int(running.id) > CHECKED_REQUESTS / 2
        return super().choose(running, engines, now)


def run(job: Job) -> Result:
    """Do it; what the policy does wrong is in the result."""
    if job.kind == "oracle":
        return replayed(job, Oracle())
    try:
        policy = load_policy(job.policy)
    except ValueError as error:
        return Result(unusable=str(error))
    match job.kind:
        case "check":
            return check(job, policy)
        case "churn":
            try:
                return Result(kept_bytes=churn(policy, job.seed, job.count))
            except PolicyError as error:
                return Result(error=f"with engines that come and go, {error}")
        case "replay":
            timed = TimedPolicy(policy, watched=False)
            router = SelectorRouter(job.policy, timed, ENGINES, ENGINE, job.seed)
            result = replayed(job, router)
            result.error = router.selector.policy.failure
            result.decision_us = timed.decision_us
            return result


def check(job: Job, policy: Policy) -> Result:
    """One engine alone; then engines of several speeds, of which one joins later."""
    timed = TimedPolicy(policy, watched=True)
    result = Result()
    for speeds in ((1.0,), CHECKED_SPEEDS):
        router = LateRouter(job.policy, timed, len(speeds), ENGINE, job.seed)
        result.routed += routed(router, job.seed, speeds)
        if failure := router.selector.policy.failure:
            engines = "one engine" if len(speeds) == 1 else f"{len(speeds)} engines"
            result.error = f"with {engines}, {failure}"
            break
    result.decision_us = timed.decision_us
    return result


def routed(router: Router, seed: int, speeds: Sequence[float]) -> list[int]:
    """Which engines it chose."""
    requests = arrivals(graded_trace("chats", seed, CHECKED_REQUESTS), 1.0, seed)
    return replay(requests, len(speeds), ENGINE, lambda: router, speeds).routed


def replayed(job: Job, router: Router) -> Result:
    """The figures of one workload."""
    trace = graded_trace(job.workload, job.seed, job.count)
    speeds = GRADED[job.workload].speeds
    made = replay(arrivals(trace, 1.0, job.seed), ENGINES, ENGINE, lambda: router, speeds)
    ttfts = [seconds * 1e3 for seconds in made.ttfts]
    return Result(
        ttft_p50_ms=percentile(ttfts, 0.5),
        ttft_p95_ms=percentile(ttfts, 0.95),
        hit_rate=made.hit_rate,
        slowdowns=slowdowns(made),
    )


def slowdowns(made: Replay) -> dict[str, float]:
    """Each tenant's mean TTFT over the time in which an idle engine computes the whole prompt."""
    by_tenant: dict[str, list[float]] = {}
    for running in made.requests:
        assert running.first_token is not None
        request = running.request
        alone = request.input_length / ENGINE.prefill_tokens_per_s + ENGINE.decode_base_ms / 1e3
        slowdown = (running.first_token - running.arrived) / alone
        by_tenant.setdefault(request.tenant, []).append(slowdown)
    return {tenant: sum(values) / len(values) for tenant, values in by_tenant.items()}


def main() -> None:
    job, path = msgspec.json.decode(sys.argv[1], type=Job), Path(sys.argv[2])
    # A policy that hoards is stopped before the machine is out of memory.
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    try:
        result = run(job)
    except BaseException as error:  # a policy may raise anything
        result = Result(error=repr(error))
    path.write_bytes(msgspec.json.encode(result))
    os._exit(0)  # a thread that the policy started would be waited for


if __name__ == "__main__":
    main()
