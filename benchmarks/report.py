"""What every benchmark reports beside its figures, and how."""

import argparse
import json
import platform
import statistics
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil


class GuardError(Exception):
    """The run does not show what it should compare; no result is printed."""


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="less of everything, under 2 minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here, too")
    return parser


def write_result(path: Path | None, result: dict[str, Any], kind: str, seeds: list[int]) -> None:
    """Write the result as JSON, with the machine, date and commit; `kind` as in the README."""
    document = {
        **result,
        "kind": kind,
        "seeds": seeds,
        "machine": machine(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
    }
    if path is not None:
        path.write_text(json.dumps(document, indent=2) + "\n")
    print(f"\n{kind}, {document['date'][:10]}, {document['machine']}, commit {document['commit']}")


def machine() -> str:
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{psutil.cpu_count()} x {_cpu_model()}, {memory:.0f} GiB, "
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    )


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0..1) of the values lie, nearest rank."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def with_spread(values: Sequence[float], digits: int = 0) -> str:
    """Median and range over the rounds: `12 (11-14)`."""
    low, middle, high = (f"{f(values):,.{digits}f}" for f in (min, median, max))
    return f"{middle} ({low}-{high})"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown CPU"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
