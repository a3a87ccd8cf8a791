"""What the benchmark says of its replays, and what it refuses to say."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import router_trace
from benchmarks.report import GuardError
from benchmarks.router_trace import measure_all
from benchmarks.router_trace_plot import plot
from benchmarks.trace_measure import Figures, Run
from benchmarks.trace_summary import check, comparisons, summary, table
from benchmarks.trace_workloads import workload
from launch.errors import LaunchError

import pytest

PNG = b"\x89PNG\r\n\x1a\n"
TYPICAL = Figures(
    requests=100,
    ttft_p50_ms=100.0,
    ttft_p95_ms=900.0,
    ttft_mean_ms=300.0,
    hit_rate=0.6,
    imbalance=1.1,
    waiting_share=0.1,
    itl_mean_ms=20.0,
    latency_mean_s=5.0,
    wall_s=1.0,
)

Result = tuple[Run, Figures]


def result(
    policy: str, speed: float = 1.0, seed: int = 1, cache_blocks: int = 2000, **figures: Any
) -> Result:
    return Run(policy, speed, cache_blocks, seed, 16), replace(TYPICAL, **figures)


def test_a_row_has_the_medians_and_the_rounds() -> None:
    results = [result("kv", seed=n, ttft_p50_ms=v) for n, v in enumerate((5.0, 90.0, 7.0))]
    (row,) = summary(results)
    assert (row["name"], row["speed"], row["cache_blocks"]) == ("kv", 1.0, 2000)
    assert row["ttft_p50_ms"] == 7.0
    assert row["rounds"]["ttft_p50_ms"] == [5.0, 90.0, 7.0]
    assert "| 2,000 | 1x | kv | 7 (5-90) | 900 (900-900) | 0.600 | 1.10 | 10% | 5.0 |" in table(
        [row]
    )


def test_policies_are_compared_where_the_best_peer_begins_to_queue() -> None:
    """Not where a worse peer does, and at the lowest such speed; per size of cache."""
    rows = summary(
        [
            result("earliest_start", 1.0),
            result("kv", 1.0, waiting_share=0.2),
            result("dynamo", 1.0, waiting_share=0.9, ttft_mean_ms=900.0),
            result("oracle", 1.0, waiting_share=0.9),
            result("earliest_start", 1.5, ttft_p50_ms=80.0, ttft_p95_ms=450.0, hit_rate=0.57),
            result("kv", 1.5, waiting_share=0.3, ttft_p50_ms=200.0, ttft_mean_ms=400.0),
            result("dynamo", 1.5, waiting_share=0.9, ttft_mean_ms=500.0, ttft_p95_ms=500.0),
            result("oracle", 1.5, hit_rate=0.6, ttft_mean_ms=1.0, ttft_p50_ms=1.0),
            result("bound", 1.5, ttft_mean_ms=1.0, ttft_p95_ms=1.0),
            result("earliest_start", 2.0),
            result("kv", 2.0, waiting_share=0.9),
            result("earliest_start", 1.0, cache_blocks=4000),
            result("kv", 1.0, cache_blocks=4000),
        ]
    )
    (found,) = comparisons(rows)
    assert found["name"] == "2000 blocks, 1.5x"
    assert found["best_peer"] == "kv"
    assert found["ttft_p50_ratio"] == 0.8  # dynamo has 100 ms
    assert found["ttft_p95_ratio"] == 0.9  # dynamo has 500 ms
    assert found["hit_rate_of_oracle"] == 0.95
    assert found["imbalance"] == 1.1


@pytest.mark.parametrize("missing", ["earliest_start", "kv"])
def test_there_is_no_comparison_without_ours_or_without_a_peer(missing: str) -> None:
    policies = {"earliest_start", "kv", "oracle", "bound"} - {missing}
    rows = summary([result(policy, waiting_share=0.9) for policy in policies])
    assert comparisons(rows) == []


def test_replays_that_are_not_alike_are_refused() -> None:
    good = [result(policy, seed=n) for policy in ("kv", "oracle") for n in (1, 2)]
    check(good, 100)
    with pytest.raises(GuardError, match="100 of 101 requests ended"):
        check(good, 101)
    with pytest.raises(GuardError, match="caches, speeds and seeds"):
        check(good[1:], 100)
    run, found = good[0]
    with pytest.raises(GuardError, match="as many engines"):
        check([(replace(run, workers=8), found), *good[1:]], 100)


def test_a_peer_that_cannot_be_run_is_left_out_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The others are measured all the same."""
    monkeypatch.setenv("NATS_SERVER", "nats://127.0.0.1:1")
    left_out: dict[str, str] = {}
    runs = [Run(policy, 1.0, 200, 1, 2) for policy in ("oracle", "KvRouter")]
    results = measure_all(partial(workload, "chats", 0, 20, 5.0), runs, left_out)
    assert [run.policy for run, _ in results] == ["oracle"]
    assert "NATS_SERVER=nats://127.0.0.1:1" in left_out["KvRouter"]


def test_without_a_nats_server_only_kv_router_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_server(_: object) -> None:
        raise LaunchError("nats-server is not on the PATH")

    monkeypatch.setattr(router_trace, "nats_server", no_server)
    left_out: dict[str, str] = {}
    runs = [Run(policy, 1.0, 200, 1, 2) for policy in ("oracle", "KvRouter")]
    results = router_trace.run_all(partial(workload, "chats", 0, 20, 5.0), runs, left_out)
    assert [run.policy for run, _ in results] == ["oracle"]
    assert left_out == {"KvRouter": "nats-server is not on the PATH"}


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    names = [f"policy {number}" for number in range(12)]
    speeds = (1.0, 2.0)
    caches = (1000, 2000)
    plot(
        summary([result(n, s, cache_blocks=c) for n in names for s in speeds for c in caches]),
        path,
        "a test",
    )
    assert path.read_bytes().startswith(PNG)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.router_trace", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_a_run_from_its_arguments_to_its_files(tmp_path: Path) -> None:
    trace = tmp_path / "a.jsonl"
    trace.write_text(
        "\n".join(
            json.dumps(
                {
                    "timestamp": made.timestamp,
                    "input_length": made.input_length,
                    "output_length": made.output_length,
                    "hash_ids": made.hash_ids,
                }
            )
            for made in workload("chats", 0, 200, 30.0)
        )
    )
    policies = "earliest_start,kv,KvRouter,SelectionService,oracle,bound"
    done = run(
        *("--quick", "--trace", trace, "--limit", 150, "--workers", 2, "--speeds", 3),
        *("--policies", policies, "--cache-blocks", 300),
        *("--json", tmp_path / "out.json", "--plot", tmp_path / "out.png"),
    )
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in written["policies"]] == policies.split(",")
    for row in written["policies"]:
        assert row.keys() >= {"ttft_p50_ms", "ttft_p95_ms", "hit_rate", "imbalance"}
        assert row["requests"] == 150
    assert (written["kind"], written["trace"]) == ("simulated", "a.jsonl")
    assert (written["requests"], written["workers"], written["left_out"]) == (150, 2, {})
    (compared,) = written["comparisons"]
    assert f"{compared['name']}, where {compared['best_peer']}, the best peer" in done.stdout
    assert (tmp_path / "out.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--policies", "kv,none"], "there is no policy 'none'"),
        (["--trace", "/no/such/file"], "No such file"),
        (["--trace", "/dev/null"], "has no requests"),
        (["--speeds", "1,0"], "above 0"),
        (["--cache-blocks", "1.5"], "--cache-blocks"),
        (["--workers", "0"], "0 is below 1"),
    ],
)
def test_bad_arguments_are_named(
    arguments: list[str],
    problem: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["router_trace", *arguments])
    with pytest.raises(SystemExit) as stopped:
        router_trace.parse_args()
    assert stopped.value.code == 2
    assert problem in capsys.readouterr().err
