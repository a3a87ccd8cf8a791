"""What can be set on the llama.cpp engine."""

import os
from dataclasses import dataclass

from common.engines.limits import check_range
from common.engines.llama_structs import MAX_SEQUENCES
from common.model_files import DEFAULT_MODEL

_CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class LlamaCppSettings:
    """`model` is a name or path for `find_model`; sizes are in tokens.

    `cache_tokens` is the pool of KV cells that all requests share. `max_sequences` is how many
    sequences it can hold at once, running or finished but still cached; it costs 0.2 MB each.
    `import_blocks` is how many blocks that another engine computed a step takes over, at most.
    `threads` compute a single token, `batch_threads` several at once.
    """

    model: str = DEFAULT_MODEL
    worker_id: int = 0
    cache_tokens: int = 8192
    block_size: int = 16
    max_sequences: int = 128
    max_running: int = 32
    max_waiting: int = 128
    prefill_chunk: int = 64
    import_blocks: int = 32
    threads: int = max(1, _CORES // 2)
    batch_threads: int = _CORES

    def __post_init__(self) -> None:
        check_range("cache_tokens", self.cache_tokens, 256, 2**31 - 1)
        check_range("block_size", self.block_size, 1, self.cache_tokens)
        check_range("max_sequences", self.max_sequences, 1, MAX_SEQUENCES - 1)
        check_range("max_running", self.max_running, 1, self.max_sequences)
        check_range("max_waiting", self.max_waiting, 0)
        check_range("prefill_chunk", self.prefill_chunk, 1, self.cache_tokens)
        check_range("import_blocks", self.import_blocks, 1)
        check_range("threads", self.threads, 1)
        check_range("batch_threads", self.batch_threads, 1)
