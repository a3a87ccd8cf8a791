"""The picture of `kv_routing`: TTFT p50 and cached share, by workload and policy."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")

from matplotlib import pyplot as plt

COLORS = {
    "random": "#9aa0a6",
    "round_robin": "#c58b3b",
    "least_loaded": "#3b78c5",
    "kv": "#76b900",
    "dynamo": "#8b5fc0",
    "earliest_start": "#1d1f1a",
}
OTHER = "#d0d0d0"
PANELS = (("ttft_p50_ms", "TTFT p50, ms"), ("cached_share", "cached share of the prompt tokens"))


def plot(workloads: list[dict[str, Any]], path: Path) -> None:
    """Draw `summary`'s result; bars are medians over the seeds, lines lowest to highest."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axis, (key, label) in zip(axes, PANELS, strict=True):
        for number, workload in enumerate(workloads):
            rows = workload["policies"]
            width = 0.8 / len(rows)
            for place, row in enumerate(rows):
                rounds = row["rounds"][key]
                x = number + (place - (len(rows) - 1) / 2) * width
                axis.bar(x, row[key], width, color=COLORS.get(row["name"], OTHER),
                         label=row["name"] if number == 0 else None)  # fmt: skip
                axis.plot([x, x], [min(rounds), max(rounds)], color="black", linewidth=1)
            if key == "cached_share":
                share = rows[0]["oracle_share"]
                axis.hlines(share, number - 0.42, number + 0.42, colors="black", linestyles="--",
                            label="oracle" if number == 0 else None)  # fmt: skip
        names = [workload["name"].replace(" ", "\n", 1) for workload in workloads]
        axis.set_xticks(range(len(workloads)), names)
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
