"""Grade a routing policy for chapter 3: TTFT, hit rate, fairness, memory and decision time.

scripts/grade my_policy.py:policy               a function of yours
scripts/grade kv                                one of the built-in policies
scripts/grade my_policy.py:policy --seed 7      the workloads that were drawn with this seed

The policy routes three workloads on eight simulated engines, in virtual time, and so do four
built-in ones and an oracle, which knows what every engine has cached and has still to do. The
workloads are drawn anew each time, so that no policy is made for them. See
benchmarks/grade_workloads.py for what they are and benchmarks/grade_marks.py for the points.
What the policy prints is not shown.

The exit status is 0 for a pass, 1 if the policy does not pass or does not work, and 2 if there
is no such policy.
"""

import argparse
import asyncio
import secrets
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.grade_jobs import PARTS, REFERENCES, FaultyError, Graded, UnusableError, grade
from benchmarks.grade_marks import (
    CRITERIA,
    FAIRNESS,
    PASS_POINTS,
    POOR_SHARE,
    Marks,
    by_workload,
    marks,
)
from benchmarks.grade_workloads import ENGINES
from benchmarks.report import write_result
from chapter3.policy_loader import POLICIES

import msgspec
from rich.console import Console
from rich.table import Table

REQUESTS = 1500
WIDTH = 116


def all_marks(graded: Graded) -> dict[str, Marks]:
    """Those of the policy, under the name "yours", of the built-in ones and of the oracle."""
    built_ins = list(graded.references.values())
    return {
        "yours": marks(graded.own, built_ins, graded.oracle, graded.kept_bytes),
        # They keep nothing, and have no place to keep it in.
        **{
            name: marks(results, built_ins, graded.oracle)
            for name, results in graded.references.items()
        },
        "oracle": marks(graded.oracle, built_ins, graded.oracle),
    }


def table(found: dict[str, Marks]) -> Table:
    """The policy's marks, beside the values of the others."""
    drawn = Table("", "yours", "points", *list(found)[1:], box=None, pad_edge=False)
    for column in drawn.columns[1:]:
        column.justify = "right"
    yours = found["yours"]
    for one in CRITERIA:
        others = [
            "" if name == "oracle" and not one.compared else one.shown(other.values[one.name])
            for name, other in found.items()
        ]
        drawn.add_row(
            f"{one.name} ({one.scale})",
            f"[bold]{one.shown(yours.values[one.name])}[/]",
            f"[bold]{yours.points[one.name]:.0f}/{one.points:g}[/]",
            *others[1:],
        )
    drawn.add_row(
        "points and grade",
        "",
        f"[bold]{yours.total} {yours.grade}[/]",
        *(f"{found[name].total} {found[name].grade}" for name in REFERENCES),
        "",
    )
    return drawn


def advice(graded: Graded, yours: Marks) -> list[str]:
    """A line for each criterion that went badly."""
    compared = by_workload(graded.own, list(graded.references.values()), graded.oracle)
    lines = []
    for one in CRITERIA:
        if yours.points[one.name] >= POOR_SHARE * one.points:
            continue
        where = ""
        if found := compared.get(one.name):
            worst = max(found, key=lambda workload: one.badness(found[workload]))
            where = f" Worst in {worst!r}: {one.shown(found[worst])}."
            if one is FAIRNESS:
                slowdowns = graded.own[worst].slowdowns
                tenant = max(slowdowns, key=lambda name: slowdowns[name])
                where = where[:-1] + f", tenant {tenant!r}."
        lines.append(f"{one.name}: {one.advice}{where}")
    if not graded.repeatable:
        lines.append(
            "Not repeatable: two runs with the same seed chose differently. That costs nothing, "
            "but random.Random(snapshot.seed) would make errors easier to find."
        )
    return lines


def as_json(graded: Graded, found: dict[str, Marks]) -> dict[str, Any]:
    measured = {"yours": graded.own, **graded.references, "oracle": graded.oracle}
    return {
        "passed": found["yours"].passed,
        "repeatable": graded.repeatable,
        "policies": [
            {
                "name": name,
                "points": one.total,
                "grade": one.grade,
                "criteria": {
                    criterion: {"value": value, "points": one.points[criterion]}
                    for criterion, value in one.values.items()
                },
                "workloads": {
                    workload: msgspec.to_builtins(result)
                    for workload, result in measured[name].items()
                },
            }
            for name, one in found.items()
        ],
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/grade",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "policy", help=f"path.py:function, or one of {', '.join(POLICIES)}", metavar="POLICY"
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="which workloads are drawn (other ones each time)"
    )
    parser.add_argument(
        "--requests", type=positive, default=REQUESTS, metavar="N",
        help="of each workload (%(default)s); fewer are faster and tell less",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here, too")
    args = parser.parse_args()
    if args.json is not None and not args.json.absolute().parent.is_dir():
        parser.error(f"argument --json: there is no folder {args.json.parent}")
    return args


def positive(text: str) -> int:
    number = int(text)
    if number < 100:
        raise argparse.ArgumentTypeError(f"{number} is below 100")
    return number


def main() -> int:
    args = parse_args()
    seed = secrets.randbelow(10**6) if args.seed is None else args.seed
    began = time.perf_counter()
    repeat = f"To repeat this: --seed {seed}"
    status = Console(stderr=True).status("Grading")
    try:
        with status:
            graded = asyncio.run(
                grade(
                    args.policy,
                    seed,
                    args.requests,
                    lambda done: status.update(f"Grading: {done} of {PARTS} parts done"),
                )
            )
    except UnusableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FaultyError as error:
        print(f"{args.policy} does not work: {error}\n\nGrade F. {repeat}")
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    found = all_marks(graded)
    yours = found["yours"]
    console = Console(width=WIDTH, highlight=False)
    console.print(
        f"{args.policy} on {ENGINES} simulated engines, {args.requests:,} requests in each of "
        "three workloads\n",
        markup=False,
    )
    console.print(table(found))
    for line in advice(graded, yours):
        console.print(f"\n{line}", markup=False)
    passed = "Passed" if yours.passed else "Not passed"
    print(
        f"\n{passed} with {yours.total} points, grade {yours.grade}; a pass takes "
        f"{PASS_POINTS:.0f} and some in every line. {time.perf_counter() - began:.0f} s. {repeat}"
    )
    if args.json is not None:
        write_result(args.json, as_json(graded, found), "simulated", [seed])
    return 0 if yours.passed else 1


if __name__ == "__main__":
    sys.exit(main())
