from common.kv import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent, block_hash, block_hashes

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

token_lists = st.lists(st.integers(0, 2**32 - 1), max_size=60)


def test_hashes_are_the_same_in_every_process_and_version() -> None:
    """Routers and engines compare hashes that different processes have computed."""
    assert block_hashes([1, 2, 3, 4, 5, 6, 7, 8, 9], 4) == [
        -7061932180603635000,
        -6705061213534025669,
    ]


@given(token_lists, token_lists, st.integers(1, 9))
def test_equal_prefixes_and_only_those_have_equal_hashes(
    first: list[int], second: list[int], block_size: int
) -> None:
    hashes = block_hashes(first, block_size), block_hashes(second, block_size)
    assert [len(h) for h in hashes] == [len(first) // block_size, len(second) // block_size]
    for i, (a, b) in enumerate(zip(*hashes, strict=False)):
        end = (i + 1) * block_size
        assert (a == b) == (first[:end] == second[:end])


def test_hashes_are_chained_and_fit_a_signed_64_bit_integer() -> None:
    hashes = block_hashes(list(range(400)), 4)
    assert len(set(hashes)) == 100
    assert hashes[1] == block_hash(hashes[0], range(4, 8))
    assert min(hashes) < 0 < max(hashes)
    assert all(-(2**63) <= h < 2**63 for h in hashes)


@pytest.mark.parametrize(
    ("event", "wire"),
    [
        (
            BlockStored([-5, 6], None, [1, 2, 3, 4], 2),
            ["BlockStored", [-5, 6], None, [1, 2, 3, 4], 2, None],
        ),
        (BlockRemoved([7]), ["BlockRemoved", [7]]),
        (AllBlocksCleared(), ["AllBlocksCleared"]),
    ],
)
def test_events_have_the_wire_format_of_vllm_and_sglang(event: KvEvent, wire: list[object]) -> None:
    data = msgspec.msgpack.encode(event)
    assert msgspec.msgpack.decode(data) == wire
    assert msgspec.msgpack.decode(data, type=KvEvent) == event
