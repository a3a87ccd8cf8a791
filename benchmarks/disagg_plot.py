"""The picture of `disagg`: ITL p99 over TTFT p95 of everything that was run."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")

from matplotlib import pyplot as plt

COLORS = {"aggregated": "#9aa0a6", "disaggregated": "#3b78c5", "conditional": "#76b900"}
PANELS = (
    ("itl_p99_ms", "ITL p99 of all answers, ms"),
    ("chat_itl_p99_ms", "ITL p99 of the chats, ms"),
)


def plot(sweep: list[dict[str, Any]], chosen: list[dict[str, Any]], path: Path) -> None:
    """A point for each chunk size, median over the seeds; those compared have a ring."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, (key, label) in zip(axes, PANELS, strict=True):
        for name in dict.fromkeys(row["name"] for row in sweep):
            some = sorted(
                (row for row in sweep if row["name"] == name), key=lambda row: row["prefill_chunk"]
            )
            x = [row["ttft_p95_ms"] for row in some]
            y = [row[key] for row in some]
            axis.plot(x, y, "o-", color=COLORS[name], label=name)
            for row in some:
                place = (row["ttft_p95_ms"], row[key])
                axis.annotate(f" {row['prefill_chunk']}", place, fontsize=8)
                if row in chosen:
                    axis.plot(*place, "o", markersize=12, fillstyle="none", color="black")
        axis.set_ylim(bottom=0)
        axis.set_xlim(left=0)
        axis.set_xlabel("TTFT p95, ms (numbers: prefill chunk size)")
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
