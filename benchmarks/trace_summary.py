"""What many replays of a trace say together: one row a policy, and ours beside the best peer."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.report import GuardError, markdown_table, median, with_spread
from benchmarks.trace_measure import Figures, Run
from chapter3.policy_loader import DEFAULT_POLICY

QUEUED_SHARE = 0.25
NO_PEERS = (DEFAULT_POLICY, "oracle", "bound")


def check(results: Sequence[tuple[Run, Figures]], requests: int) -> None:
    """That all have replayed the same.

    Raises:
        GuardError: they have not.
    """
    rounds: dict[str, set[tuple[int, float, int]]] = {}
    for run, found in results:
        if found.requests != requests:
            raise GuardError(f"{run}: {found.requests} of {requests} requests ended")
        rounds.setdefault(run.policy, set()).add((run.cache_blocks, run.speed, run.seed))
    if len({run.workers for run, _ in results}) > 1:
        raise GuardError("not all replays have as many engines")
    if len({frozenset(of_policy) for of_policy in rounds.values()}) > 1:
        raise GuardError("not all policies were replayed with the same caches, speeds and seeds")


def summary(results: Sequence[tuple[Run, Figures]]) -> list[dict[str, Any]]:
    """One row for each policy, speed and cache size: medians over the seeds, and the rounds."""
    grouped: dict[tuple[int, float, str], list[Figures]] = {}
    for run, found in results:
        grouped.setdefault((run.cache_blocks, run.speed, run.policy), []).append(found)
    rows = []
    for (cache_blocks, speed, policy), rounds in grouped.items():
        columns = {key: [asdict(found)[key] for found in rounds] for key in asdict(rounds[0])}
        rows.append(
            {
                "name": policy,
                "speed": speed,
                "cache_blocks": cache_blocks,
                **{key: round(median(values), 4) for key, values in columns.items()},
                "rounds": columns,
            }
        )
    return rows


def comparisons(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours at the load where the best peer begins to queue, by cache size.

    The best peer has the lowest mean TTFT. The ratios are to the lowest p50 and the lowest p95
    of any peer, whoever has it.
    """
    found = []
    for cache_blocks in sorted({row["cache_blocks"] for row in rows}):
        for speed in sorted({row["speed"] for row in rows}):
            here = {
                row["name"]: row
                for row in rows
                if (row["cache_blocks"], row["speed"]) == (cache_blocks, speed)
            }
            peers = [row for name, row in here.items() if name not in NO_PEERS]
            if not peers or DEFAULT_POLICY not in here:
                continue
            ours, best = here[DEFAULT_POLICY], min(peers, key=lambda row: row["ttft_mean_ms"])
            if best["waiting_share"] < QUEUED_SHARE:
                continue
            oracle = here.get("oracle")
            found.append(
                {
                    "name": f"{cache_blocks} blocks, {speed:g}x",
                    "best_peer": best["name"],
                    "ttft_p50_ratio": _to_lowest(ours, peers, "ttft_p50_ms"),
                    "ttft_p95_ratio": _to_lowest(ours, peers, "ttft_p95_ms"),
                    "hit_rate_of_oracle": oracle and _ratio(ours, oracle, "hit_rate"),
                    "imbalance": ours["imbalance"],
                }
            )
            break
    return found


def _to_lowest(ours: dict[str, Any], peers: list[dict[str, Any]], key: str) -> float:
    return _ratio(ours, min(peers, key=lambda row: row[key]), key)


def _ratio(ours: dict[str, Any], other: dict[str, Any], key: str) -> float:
    return round(ours[key] / other[key], 4) if other[key] else 1.0


def table(rows: list[dict[str, Any]]) -> str:
    header = ["cache", "speed", "policy", "TTFT p50 ms", "TTFT p95 ms", "hit rate"]
    header += ["busiest engine", "waited > 50 ms", "whole answer, mean s"]
    lines = [
        [
            f"{row['cache_blocks']:,}",
            f"{row['speed']:g}x",
            row["name"],
            with_spread(row["rounds"]["ttft_p50_ms"]),
            with_spread(row["rounds"]["ttft_p95_ms"]),
            f"{row['hit_rate']:.3f}",
            f"{row['imbalance']:.2f}",
            f"{row['waiting_share']:.0%}",
            f"{row['latency_mean_s']:.1f}",
        ]
        for row in rows
    ]
    return markdown_table(header, lines)
