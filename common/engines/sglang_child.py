"""What SGLang's scheduler process runs, and what is sent to it; importing this imports SGLang.

SGLang without a tokenizer has no grammar backend and no `min_new_tokens` either. So its scheduler,
where both need one, gets a tokenizer; it is in the process that takes requests that there is none,
and the scheduler still sends token ids straight to that.
"""

import signal
from typing import Any

from sglang.srt.managers import scheduler
from sglang.srt.runtime_context import get_context
from sglang.srt.sampling.sampling_params import SamplingParams


def run_scheduler(server_args: Any, port_args: Any, *args: Any, **kwargs: Any) -> None:
    """For `Engine.run_scheduler_process_func`."""
    # A terminal sends it to the whole group; the engine component decides what to do about it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if server_args.grammar_backend != "none":
        # With a tokenizer it would send its tokens to a detokenizer.
        port_args.detokenizer_ipc_name = port_args.tokenizer_ipc_name
        scheduler.Scheduler = _SchedulerWithTokenizer
    scheduler.run_scheduler_process(server_args, port_args, *args, **kwargs)


class _SchedulerWithTokenizer(scheduler.Scheduler):  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        get_context().override(__name__, skip_tokenizer_init=False)
        super().__init__(*args, **kwargs)


class SchedulerSampling(SamplingParams):  # type: ignore[misc]
    """SGLang's parameters, with `min_new_tokens` although there is no tokenizer in this process."""

    def normalize(self, tokenizer: Any) -> None:
        own: Any = self
        min_new_tokens, own.min_new_tokens = own.min_new_tokens, 0
        super().normalize(tokenizer)
        own.min_new_tokens = min_new_tokens
