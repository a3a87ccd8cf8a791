"""Where the KV of a block is in the buffer."""

from common.kv_transfer.pieces import KvPieces

import numpy as np
import pytest


def test_pieces_are_numbered_like_the_prompts_blocks() -> None:
    pieces = KvPieces(np.arange(25, dtype=np.uint8), first=7, tokens=123, piece_bytes=10)
    assert (pieces.size, pieces.end) == (25, 10)
    assert [list(pieces.piece(i)) for i in (7, 8, 9)] == [
        list(range(10)),
        list(range(10, 20)),
        list(range(20, 25)),
    ]
    assert list(pieces.pieces_from(8)) == list(range(10, 25))
    for block in (6, 10):
        with pytest.raises(IndexError, match=f"block {block} is not one of 7 to 9"):
            pieces.piece(block)


def test_a_piece_can_be_written_to() -> None:
    pieces = KvPieces(np.zeros(20, np.uint8), 0, 1, 10)
    pieces.piece(1)[:] = bytes(range(10))
    assert list(pieces.buffer) == [0] * 10 + list(range(10))


@pytest.mark.parametrize(
    ("size", "first", "tokens", "piece_bytes"),
    [(0, 0, 1, 1), (1, -1, 1, 1), (1, 0, 0, 1), (1, 0, 1, 0)],
)
def test_nothing_is_no_kv(size: int, first: int, tokens: int, piece_bytes: int) -> None:
    with pytest.raises(ValueError, match="no KV"):
        KvPieces(np.zeros(size, np.uint8), first, tokens, piece_bytes)
