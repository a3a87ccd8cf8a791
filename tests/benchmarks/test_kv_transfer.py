"""The comparison of ways to move KV: everyone moves the same, and wrong data gives no figures."""

from benchmarks.kv_transfer import measure, row, tables
from benchmarks.kv_transfer_contenders import (
    MEMCPY,
    PIECE_BYTES,
    Contenders,
    contenders,
    content,
    stamp,
)
from benchmarks.report import GuardError

import numpy as np
import pytest
from numpy.typing import NDArray


async def test_everyone_moves_what_was_lent() -> None:
    async with contenders() as moving:
        assert {"memcpy", "memcpy, new memory", "shared memory", "zmq"} <= set(moving.by_name)
        seconds = await measure(moving, PIECE_BYTES, rounds=2, repeats=3)
    assert {len(times) for rounds in seconds.values() for times in rounds} == {3}
    rows = [row(who, PIECE_BYTES, rounds, seconds[MEMCPY]) for who, rounds in seconds.items()]
    assert [entry["of_memcpy"] for entry in rows if entry["who"] == MEMCPY] == [1.0]
    assert min(entry["gb_per_s"] for entry in rows) > 0
    assert tables(rows).count("| zmq |") == 1


async def test_wrong_data_gives_no_figures() -> None:
    """Neither does what an earlier transfer left."""

    async def stale(size: int, number: int) -> tuple[float, NDArray[np.uint8]]:
        data = content(size)
        stamp(data, 1)
        return 0.001, data

    moving = Contenders.__new__(Contenders)
    moving.by_name = {"zmq": stale}
    with pytest.raises(GuardError, match="zmq: what came of 1000 bytes is not what was lent"):
        await measure(moving, 1000, rounds=1, repeats=1)


def test_the_speed_is_the_median_of_the_rounds() -> None:
    entry = row("zmq", 10**9, [[1.0, 0.5, 0.25], [2.0, 2.0], [0.1]], [[0.25]] * 3)
    assert entry["rounds"]["gb_per_s"] == [2.0, 0.5, 10.0]
    assert (entry["gb_per_s"], entry["of_memcpy"]) == (2.0, 0.5)
