"""The points of a grade: what each criterion measures, what it is worth, and what helps.

TTFTs and slowdowns count as multiples of the best built-in policy's on the same workload, the
hit rate as a share of the oracle's; over the workloads it is their geometric mean. Full points
are for what is as good, none for `worst` and beyond, and between them they fall with the
logarithm: twice as slow costs as much from one as from two.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.grade_job import Result

Results = Mapping[str, Result]  # by workload

PASS_POINTS = 65.0
GRADES = {"A": 90.0, "B": 80.0, "C": PASS_POINTS, "D": 50.0, "F": 0.0}
POOR_SHARE = 0.7  # who gets less of a criterion's points gets advice
WORST = 4.0  # times the best built-in's
KEPT_BYTES = 4.0
DECISION_US = 1000.0


@dataclass(frozen=True)
class Criterion:
    """`points` are those of `best` or less; with `worst` there are none. `scale` explains values.

    Of the hit rate, more is better: its `best` is above its `worst`.
    """

    name: str
    scale: str
    points: float
    best: float
    worst: float
    advice: str
    digits: int = 2
    compared: bool = True  # with the built-in policies, and not a limit

    def shown(self, value: float) -> str:
        return f"{value:.{self.digits}f}"

    def points_for(self, value: float) -> float:
        if self.best == self.worst:
            return self.points if value <= self.best else 0.0
        return self.points * min(max(1.0 - self.badness(value), 0.0), 1.0)

    def badness(self, value: float) -> float:
        """0 at `best`, 1 at `worst`, and beyond."""
        return math.log(max(value, 1e-9) / self.best) / math.log(self.worst / self.best)


TTFT_P50 = Criterion(
    "TTFT p50", "1 = best built-in", 20, 1.0, WORST,
    "Half of all requests wait long. What a prompt costs is what is not cached: see new_tokens.",
)  # fmt: skip
TTFT_P95 = Criterion(
    "TTFT p95", "1 = best built-in", 20, 1.0, WORST,
    "The unlucky ones wait behind long prompts: see prefill_s, what an engine has still to do.",
)  # fmt: skip
HIT_RATE = Criterion(
    "hit rate", "1 = oracle", 20, 0.98, 0.6,
    "Prompts are computed that are cached elsewhere: see overlap_blocks.",
)  # fmt: skip
FAIRNESS = Criterion(
    "worst tenant's slowdown", "1 = best built-in", 20, 1.0, WORST,
    "One tenant waits longer than any has to. It should not be alone with long prompts.",
)  # fmt: skip
MEMORY = Criterion(
    "bytes kept of each request", f"{KEPT_BYTES:g} allowed", 10, KEPT_BYTES, KEPT_BYTES,
    "They are kept for ever: remember only the last few thousand requests, or those of a "
    "minute of snapshot.now.",
    compared=False,
)  # fmt: skip
DECISION = Criterion(
    "decision p99 in µs", f"{DECISION_US:,g} allowed", 10, DECISION_US, DECISION_US,
    "It takes too long for a router that makes up to 1,000 decisions in a second.",
    digits=0, compared=False,
)  # fmt: skip
CRITERIA = (TTFT_P50, TTFT_P95, HIT_RATE, FAIRNESS, MEMORY, DECISION)


@dataclass(frozen=True)
class Marks:
    """`values` is what counts, and `points` are those for it, both by criterion."""

    values: dict[str, float]

    @property
    def points(self) -> dict[str, float]:
        return {one.name: one.points_for(self.values[one.name]) for one in CRITERIA}

    @property
    def total(self) -> int:
        return round(sum(self.points.values()))

    @property
    def passed(self) -> bool:
        """With enough points, and some in every criterion."""
        return self.total >= PASS_POINTS and all(self.points.values())

    @property
    def grade(self) -> str:
        """`A` to `F`; at most `D` where it did not pass."""
        letter = next(letter for letter, least in GRADES.items() if self.total >= least)
        return letter if self.passed or letter == "F" else "D"


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(math.fsum(math.log(max(value, 1e-9)) for value in values) / len(values))


def against_best(
    own: Results, built_ins: Sequence[Results], figure: Callable[[Result], float]
) -> dict[str, float]:
    """By workload, the figure over the lowest that a built-in policy has there."""
    return {
        workload: figure(result) / min(figure(one[workload]) for one in built_ins)
        for workload, result in own.items()
    }


def by_workload(
    own: Results, built_ins: Sequence[Results], oracle: Results
) -> dict[str, dict[str, float]]:
    """What counts, by criterion and workload."""
    return {
        TTFT_P50.name: against_best(own, built_ins, lambda result: result.ttft_p50_ms),
        TTFT_P95.name: against_best(own, built_ins, lambda result: result.ttft_p95_ms),
        HIT_RATE.name: {
            workload: result.hit_rate / oracle[workload].hit_rate
            for workload, result in own.items()
        },
        FAIRNESS.name: against_best(own, built_ins, worst_slowdown),
    }


def marks(
    own: Results, built_ins: Sequence[Results], oracle: Results, kept_bytes: float = 0.0
) -> Marks:
    compared = by_workload(own, built_ins, oracle)
    return Marks(
        {
            **{name: geometric_mean(list(found.values())) for name, found in compared.items()},
            MEMORY.name: kept_bytes,
            DECISION.name: max(result.decision_us for result in own.values()),
        }
    )


def worst_slowdown(result: Result) -> float:
    """Of the tenant that has the worst."""
    return max(result.slowdowns.values())
