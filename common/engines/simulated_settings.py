"""What can be set on the simulated engine."""

from dataclasses import dataclass

from common.engines.limits import check_range
from common.model_files import DEFAULT_MODEL


@dataclass(frozen=True)
class SimulatedSettings:
    """Sizes are in tokens; `token_ids` are the first and the last id that outputs are made of.

    With `zero_delay` nothing waits: up to `max_running + max_waiting` requests run at once,
    each as fast as it is read. A request without `max_tokens` (and without `ignore_eos`) ends
    by itself after `mean_output_tokens` on average; one with `max_tokens` gives exactly so many.
    KV that another engine computed arrives at `transfer_tokens_per_s`.
    """

    model: str = DEFAULT_MODEL
    worker_id: int = 0
    context_length: int = 8192
    cache_tokens: int = 65536
    block_size: int = 16
    max_running: int = 64
    max_waiting: int = 256
    prefill_chunk: int = 512
    prefill_tokens_per_s: float = 8000.0
    transfer_tokens_per_s: float = 50_000.0
    decode_base_ms: float = 5.0
    decode_ms_per_request: float = 0.2
    tokens_per_item: int = 1
    zero_delay: bool = False
    mean_output_tokens: int = 128
    token_ids: tuple[int, int] = (1000, 3350)  # whole characters in SmolLM2's vocabulary

    def __post_init__(self) -> None:
        check_range("context_length", self.context_length, 2)
        check_range("cache_tokens", self.cache_tokens, 2)
        check_range("block_size", self.block_size, 1, self.cache_tokens)
        check_range("max_running", self.max_running, 1)
        check_range("max_waiting", self.max_waiting, 0)
        check_range("prefill_chunk", self.prefill_chunk, 1)
        check_range("prefill_tokens_per_s", self.prefill_tokens_per_s, 1)
        check_range("transfer_tokens_per_s", self.transfer_tokens_per_s, 1)
        check_range("decode_base_ms", self.decode_base_ms, 0)
        check_range("decode_ms_per_request", self.decode_ms_per_request, 0)
        check_range("tokens_per_item", self.tokens_per_item, 1)
        check_range("mean_output_tokens", self.mean_output_tokens, 1)
        check_range("token_ids[0]", self.token_ids[0], 0, self.token_ids[1])
