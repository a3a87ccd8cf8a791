"""What vLLM says of its load after each step, and what we count ourselves."""

from typing import Any


class VllmStats:
    """vLLM's "stat logger" (`vllm/v1/metrics/loggers.py`), and the counters of `EngineMetrics`."""

    def __init__(self) -> None:
        self.running = 0
        self.cache_usage = 0.0  # share of the blocks that running requests hold
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.output_tokens = 0

    def record(self, scheduler_stats: Any = None, *_: Any, **__: Any) -> None:
        if scheduler_stats is not None:
            self.running = scheduler_stats.num_running_reqs
            self.cache_usage = scheduler_stats.kv_cache_usage

    def log_engine_initialized(self) -> None:
        pass

    def log(self) -> None:
        pass

    def record_sleep_state(self, *_: Any) -> None:
        pass
