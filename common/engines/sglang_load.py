"""How busy an SGLang is, from what it reports and from the requests that it has."""

import time
from typing import Any

from common.engines.scheduled_request import ScheduledRequest
from common.protocol import EngineMetrics

import zmq
import zmq.asyncio


class SGLangLoad:
    """`run` reads SGLang's reports, of which `address` gets one a batch, or one in several steps.

    Their sizes are in tokens, whatever they are called.
    """

    def __init__(self, address: str, block_size: int) -> None:
        self._block_size = block_size
        self._waiting = self._used_tokens = 0
        self._prompt_tokens = self._cached_tokens = self._output_tokens = 0
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.linger = 0
        self._socket.bind(address)

    async def run(self) -> None:
        """Take in every report; never returns."""
        from sglang.srt.managers.io_struct import async_sock_recv

        while True:
            report = await async_sock_recv(self._socket)
            self._waiting = report.num_requests_waiting
            self._used_tokens = report.kv_active_blocks

    def count(self, request: ScheduledRequest, meta: dict[str, Any], tokens: int) -> None:
        """Count an output of `tokens` tokens; the first one tells about its prompt, too."""
        if request.first_token is None:
            request.started = request.arrived + meta.get("queue_time", 0.0)
            request.first_token = time.perf_counter()
            request.cached_tokens = meta.get("cached_tokens", 0)
            self._prompt_tokens += len(request.tokens)
            self._cached_tokens += request.cached_tokens
        self._output_tokens += tokens

    def metrics(self, requests: int, total_blocks: int) -> EngineMetrics:
        """The load with that many requests in SGLang, which reports nothing when it is idle."""
        waiting = min(self._waiting, requests)
        used = -(-self._used_tokens // self._block_size) if requests else 0
        return EngineMetrics(
            running=requests - waiting,
            waiting=waiting,
            used_blocks=min(used, total_blocks),
            total_blocks=total_blocks,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            output_tokens=self._output_tokens,
        )

    def close(self) -> None:
        self._socket.close()
        self._context.term()
