"""Traces: files in Mooncake's format and what is wrong in one, and those made by hand."""

import json
from pathlib import Path
from typing import Any

from benchmarks.trace import BLOCK_SIZE, load_trace
from benchmarks.trace_workloads import WORKLOADS, workload

import pytest

GOOD = {"timestamp": 27482, "input_length": 1100, "output_length": 52, "hash_ids": [46, 47, 2353]}


def written(folder: Path, *lines: dict[str, Any] | str) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return path


def test_requests_come_in_the_order_of_their_arrival(tmp_path: Path) -> None:
    late, early = GOOD | {"timestamp": 9.5}, GOOD | {"timestamp": 3, "chat_id": 17}
    first, second = load_trace(written(tmp_path, late, "", early, ""))
    assert (first.timestamp, second.timestamp) == (3, 9.5)
    assert (first.input_length, first.output_length) == (1100, 52)
    assert first.hash_ids == [46, 47, 2353]
    assert first.full_blocks == [46, 47]
    assert load_trace(written(tmp_path, late, early), limit=1) == [first]


def test_a_last_block_that_is_full_can_be_shared(tmp_path: Path) -> None:
    (request,) = load_trace(written(tmp_path, GOOD | {"input_length": 3 * BLOCK_SIZE}))
    assert request.full_blocks == request.hash_ids


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("not JSON", "JSON is malformed"),
        ("[1, 2]", "Expected `object`"),
        ({key: GOOD[key] for key in ("timestamp", "hash_ids", "input_length")}, "output_length"),
        (GOOD | {"timestamp": "now"}, r"\$.timestamp"),
        (GOOD | {"timestamp": -1}, r"\$.timestamp"),
        (GOOD | {"input_length": 0, "hash_ids": []}, "a length is below 1"),
        (GOOD | {"output_length": 0}, "a length is below 1"),
        (GOOD | {"input_length": 1024}, "3 hash ids for 2 blocks of 512 tokens"),
        (GOOD | {"hash_ids": [1, 2, -3]}, r"\$.hash_ids\[2\]"),
        (GOOD | {"hash_ids": [1, 2, 2**32]}, r"\$.hash_ids\[2\]"),
        (GOOD | {"hash_ids": [1, 2, 1]}, "a hash id occurs twice"),
    ],
)
def test_an_error_names_the_line_and_what_is_wrong(
    line: dict[str, Any] | str, problem: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"trace.jsonl, line 3: .*{problem}"):
        load_trace(written(tmp_path, GOOD, "", line))


@pytest.mark.parametrize("name", WORKLOADS)
def test_traces_made_by_hand_are_in_the_format(name: str, tmp_path: Path) -> None:
    made = workload(name, 1, 300, 100.0)
    assert made == workload(name, 1, 300, 100.0)
    assert made != workload(name, 2, 300, 100.0)
    assert len(made) == 300
    lines = [
        {key: getattr(request, key) for key in ("timestamp", *list(GOOD)[1:])} for request in made
    ]
    read = load_trace(written(tmp_path, *lines))
    assert [(r.timestamp, r.hash_ids) for r in read] == [(r.timestamp, r.hash_ids) for r in made]
    first: dict[int, int | None] = {}  # the block before each one: always the same
    for request in made:
        for before, block in zip([None, *request.hash_ids], request.hash_ids, strict=False):
            assert first.setdefault(block, before) == before
