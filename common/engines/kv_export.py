"""The KV of a prompt as bytes, a piece for each block, so that any run of blocks can travel.

Blocks are copied out as they are computed, so that the last step leaves little to do before the
first token can go.
"""

from common.engines.blocks import CachedSequence
from common.engines.llama_context import LlamaContext
from common.kv_transfer.pieces import KvPieces

import numpy as np


class KvExport:
    """Copies one prompt of `tokens` tokens; for the thread that the context belongs to."""

    def __init__(self, context: LlamaContext, tokens: int, block_size: int) -> None:
        self._context = context
        self._tokens = tokens
        self._block_size = block_size
        self._pieces: KvPieces | None = None
        self._sequence: CachedSequence | None = None
        self._copied = 0  # blocks

    def copy_computed(self, sequence: CachedSequence) -> None:
        """Copy the full blocks that have been computed since the last call.

        Raises:
            LlamaCppError: llama.cpp does not give them.
        """
        if sequence is not self._sequence:  # the one before gave its cells up
            self._sequence, self._copied = sequence, 0
        computed = min(len(sequence.tokens), self._tokens)
        while self._copied < computed // self._block_size:
            self._copy(sequence, self._copied, (self._copied + 1) * self._block_size)

    def finish(self, sequence: CachedSequence) -> KvPieces:
        """The pieces, once all of the prompt is computed; raises as `copy_computed`."""
        self.copy_computed(sequence)
        if self._tokens % self._block_size:
            self._copy(sequence, self._copied, self._tokens)
        assert self._pieces is not None  # noqa: S101 (a prompt has a token)
        return self._pieces

    def _copy(self, sequence: CachedSequence, block: int, end: int) -> None:
        if self._pieces is None:
            self._pieces = self._allocate(sequence)
        piece = self._pieces.piece(block)
        self._context.export_kv(sequence.id, block * self._block_size, end, piece)
        self._copied = block + 1

    def _allocate(self, sequence: CachedSequence) -> KvPieces:
        """Room for all of it; the size of a piece is a constant and so much for each token."""
        one = self._context.export_bytes(sequence.id, 0, 1)
        most = min(self._block_size, self._tokens)
        piece = self._context.export_bytes(sequence.id, 0, most)
        each = (piece - one) // (most - 1) if most > 1 else 0
        full, rest = divmod(self._tokens, self._block_size)
        size = full * piece + (one + (rest - 1) * each if rest else 0)
        return KvPieces(np.empty(size, np.uint8), 0, self._tokens, piece)
