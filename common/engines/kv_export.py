"""The KV of a sequence as bytes, a piece for each block, so that any run of blocks can travel."""

from common.engines.blocks import CachedSequence
from common.engines.llama_context import LlamaContext
from common.kv_transfer.pieces import KvPieces

import numpy as np


def export_pieces(context: LlamaContext, sequence: CachedSequence, block_size: int) -> KvPieces:
    """Copy all of the sequence's KV; for the thread that the context belongs to.

    Raises:
        LlamaCppError: llama.cpp does not give it.
    """
    tokens = len(sequence.tokens)
    full, rest = divmod(tokens, block_size)
    piece_bytes = context.export_bytes(sequence.id, 0, min(block_size, tokens))
    rest_bytes = context.export_bytes(sequence.id, full * block_size, tokens) if rest else 0
    size = full * piece_bytes + rest_bytes
    pieces = KvPieces(np.empty(size, np.uint8), 0, tokens, piece_bytes)
    for block in range(full + (rest > 0)):
        start = block * block_size
        end = min(start + block_size, tokens)
        context.export_kv(sequence.id, start, end, pieces.piece(block))
    return pieces
