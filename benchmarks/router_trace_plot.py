"""The plot of `benchmarks.router_trace`: TTFT over load, one line a policy."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

FIGURES = {"ttft_p50_ms": "TTFT p50, ms", "ttft_p95_ms": "TTFT p95, ms", "hit_rate": "hit rate"}
OURS = "earliest_start"


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """One row of charts for each cache size; times on a logarithmic scale."""
    caches = sorted({row["cache_blocks"] for row in rows})
    height = 3.6 * len(caches) + 0.7
    figure, grid = pyplot.subplots(len(caches), len(FIGURES), figsize=(12, height), squeeze=False)
    names = list(dict.fromkeys(row["name"] for row in rows))
    colors = pyplot.get_cmap("tab20")
    for charts, cache_blocks in zip(grid, caches, strict=True):
        for chart, (key, label) in zip(charts, FIGURES.items(), strict=True):
            for number, name in enumerate(names):
                here = sorted(
                    (row["speed"], row[key])
                    for row in rows
                    if (row["name"], row["cache_blocks"]) == (name, cache_blocks)
                )
                chart.plot(
                    *zip(*here, strict=True),
                    label=name,
                    color="black" if name == OURS else colors(number * 2 % 20 + number // 10),
                    linewidth=2.6 if name == OURS else 1.2,
                    linestyle="--" if name in ("oracle", "bound") else "-",
                    marker="o",
                    markersize=3,
                )
            if key != "hit_rate":
                chart.set_yscale("log")
            chart.set_title(f"{label}, {cache_blocks:,} blocks an engine", fontsize=10)
            chart.set_xlabel("speed of the trace")
            chart.grid(alpha=0.3)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=6, fontsize=9, frameon=False)
    figure.suptitle(f"Simulated: {title}", fontsize=12)
    figure.tight_layout(rect=(0, 0.7 / height, 1, 1))
    figure.savefig(path, dpi=90)
