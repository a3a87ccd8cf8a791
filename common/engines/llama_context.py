"""A loaded model with its KV cells: computes batches of tokens, hands out logits."""

from dataclasses import dataclass
from pathlib import Path

from common.engines.llama_capi import LlamaCppError, Vocab, last_errors, library

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ContextSize:
    """`cells` and `batch` are in tokens; a batch may ask for the logits of `sequences` tokens.

    One more sequence is the context's own, for KV on its way in and out.
    """

    cells: int
    sequences: int
    batch: int
    threads: int
    batch_threads: int


class LlamaContext:
    """One llama.cpp context and its weights; for one thread at a time. A `CellMemory`."""

    def __init__(self, path: Path, size: ContextSize) -> None:
        self.lib = library()
        self.vocab = Vocab(path, weights=True)
        try:
            self._check_kind(path)
            self.handle: int | None = self._make(size)
        except LlamaCppError:
            self.vocab.close()
            raise
        self.cells: int = self.lib.llama_n_ctx(self.handle)
        self._memory = self.lib.llama_get_memory(self.handle)
        self._batch = self.lib.llama_batch_init(size.batch, 0, 1)
        self._batch_size = size.batch
        self._spare = size.sequences

    def _check_kind(self, path: Path) -> None:
        for kind in ("is_recurrent", "is_hybrid", "has_encoder"):
            if getattr(self.lib, f"llama_model_{kind}")(self.vocab.model):
                raise LlamaCppError(
                    f"the model {path} {kind.replace('_', ' ')}: its state cannot be cached in "
                    "blocks; a decoder with attention in every layer is needed"
                )

    def _make(self, size: ContextSize) -> int:
        params = self.lib.llama_context_default_params()
        params.n_ctx = size.cells
        params.n_seq_max = size.sequences + 1  # with the spare one
        params.n_batch = params.n_ubatch = size.batch
        params.n_outputs_max = size.sequences + 1
        params.n_threads = size.threads
        params.n_threads_batch = size.batch_threads
        params.kv_unified = True  # one pool of cells, so that sequences can share them
        handle: int | None = self.lib.llama_init_from_model(self.vocab.model, params)
        if not handle:
            raise LlamaCppError(f"llama.cpp makes no context of {size}{last_errors()}")
        return handle

    def add(self, token: int, position: int, sequence: int, *, logits: bool) -> int:
        """Put a token into the next batch and return its index there.

        Raises:
            IndexError: the batch is full.
        """
        batch = self._batch
        index: int = batch.n_tokens
        if index == self._batch_size:
            raise IndexError(f"the batch has all of its {index} tokens")
        batch.token[index] = token
        batch.pos[index] = position
        batch.n_seq_id[index] = 1
        batch.seq_id[index][0] = sequence
        batch.logits[index] = logits
        batch.n_tokens = index + 1
        return index

    def decode(self) -> None:
        """Compute the batch and begin an empty one.

        Raises:
            LlamaCppError: it failed; the context cannot be used any more.
        """
        status = self.lib.llama_decode(self.handle, self._batch)
        self._batch.n_tokens = 0
        if status != 0:
            raise LlamaCppError(f"llama_decode returned {status}{last_errors()}")

    def logits(self, index: int) -> NDArray[np.float32]:
        """The logits of a token of the last batch: a view, valid until the next `decode`."""
        pointer = self.lib.llama_get_logits_ith(self.handle, index)
        if not pointer:
            raise LlamaCppError(f"the batch has no logits at {index}{last_errors()}")
        return np.ctypeslib.as_array(pointer, (self.vocab.n_tokens,))

    def share(self, source: int, target: int, start: int, end: int) -> None:
        self.lib.llama_memory_seq_cp(self._memory, source, target, start, end)

    def remove(self, sequence: int, start: int, end: int) -> None:
        if not self.lib.llama_memory_seq_rm(self._memory, sequence, start, end):
            raise LlamaCppError(f"cannot remove the cells {start}..{end} of sequence {sequence}")

    def clear(self) -> None:
        """Free all cells of all sequences."""
        self.lib.llama_memory_clear(self._memory, False)

    def positions(self, sequence: int) -> tuple[int, int]:
        """The first and the last position that the sequence has cells for; -1, -1 if none."""
        return (
            self.lib.llama_memory_seq_pos_min(self._memory, sequence),
            self.lib.llama_memory_seq_pos_max(self._memory, sequence),
        )

    def state_bytes(self, sequence: int) -> int:
        """The size of the sequence's state: a constant and so much for each of its cells."""
        size: int = self.lib.llama_state_seq_get_size(self.handle, sequence)
        return size

    def export_bytes(self, sequence: int, start: int, end: int) -> int:
        """The size of what `export_kv` writes."""
        self.share(sequence, self._spare, start, end)
        size = self.state_bytes(self._spare)
        self.remove(self._spare, start, end)
        return size

    def export_kv(self, sequence: int, start: int, end: int, into: memoryview) -> None:
        """Copy the KV of these positions; `into` has `export_bytes` bytes.

        Raises:
            LlamaCppError: they do not fit.
        """
        self.share(sequence, self._spare, start, end)
        address = np.frombuffer(into, np.uint8).ctypes.data
        written = self.lib.llama_state_seq_get_data(self.handle, address, into.nbytes, self._spare)
        self.remove(self._spare, start, end)
        if written != into.nbytes:
            raise LlamaCppError(f"{written} bytes of KV, not {into.nbytes}{last_errors()}")

    def import_kv(self, sequence: int, start: int, end: int, data: memoryview) -> bool:
        """Make what `export_kv` gave for the same positions this sequence's KV.

        False: it is not of this model, or there are no cells for it.
        """
        if not _has_positions(data, start, end):
            return False  # llama.cpp would take any, and could not free some of them again
        address = np.frombuffer(data, np.uint8).ctypes.data
        read = self.lib.llama_state_seq_set_data(self.handle, address, data.nbytes, self._spare)
        found = self.positions(self._spare)
        taken = bool(read == data.nbytes and found == (start, end - 1))
        if taken:
            self.share(self._spare, sequence, start, end)
        self.remove(self._spare, 0, self.cells)
        return taken

    def close(self) -> None:
        if self.handle:
            self.lib.llama_batch_free(self._batch)
            self.lib.llama_free(self.handle)
            self.handle = None
            self.vocab.close()


def _has_positions(data: memoryview, start: int, end: int) -> bool:
    """Whether a sequence's state is of these positions, which are in the order of the cells.

    It begins with 32-bit numbers: magic, sequence, streams, cells; and for each cell position,
    sequences and sequence (llama_kv_cache::state_write_meta in llama.cpp's llama-kv-cache.cpp).
    """
    size = 4 * (4 + 3 * (end - start))
    if data.nbytes < size:
        return False
    head = np.frombuffer(data[:size], "<i4")
    positions = np.sort(head[4::3])
    return bool(head[3] == end - start and np.array_equal(positions, np.arange(start, end)))
