"""The KV of consecutive blocks in one buffer."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class KvPieces:
    """The KV of blocks `first`, `first + 1`, … of a prompt, one piece after the other.

    `tokens` counts the prompt's tokens from its beginning to the end of the last piece, and
    `piece_bytes` is the size of a full block's piece; the last one may be shorter. The buffer
    is of one dimension and contiguous.
    """

    buffer: NDArray[np.uint8]
    first: int
    tokens: int
    piece_bytes: int

    def __post_init__(self) -> None:
        if min(self.first, self.tokens - 1, self.piece_bytes - 1, self.size - 1) < 0:
            raise ValueError(
                f"no KV: {self.size} bytes in pieces of {self.piece_bytes}, the first of block "
                f"{self.first}, for {self.tokens} tokens"
            )

    @property
    def size(self) -> int:
        """Bytes in the buffer."""
        return self.buffer.nbytes

    @property
    def end(self) -> int:
        """The number of the block after the last."""
        return self.first + -(-self.size // self.piece_bytes)

    def piece(self, block: int) -> memoryview:
        """The bytes of a block by its number in the prompt, not copied.

        Raises:
            IndexError: there is no such block in here.
        """
        return self.pieces_from(block)[: self.piece_bytes]

    def pieces_from(self, block: int) -> memoryview:
        """The bytes of a block and of all after it, not copied.

        Raises:
            IndexError: there is no such block in here.
        """
        if not self.first <= block < self.end:
            raise IndexError(f"block {block} is not one of {self.first} to {self.end - 1}")
        return self.buffer.data[(block - self.first) * self.piece_bytes :]
