"""The tokens that a simulated engine generates."""

import struct
import zlib

from common.engines.scheduled_request import ScheduledRequest
from common.engines.scheduler import Scheduler
from common.protocol import FinishReason


class SimulatedOutput:
    """One request's output: every token follows from all tokens before it, by a hash.

    `token_ids` is the first and the last id to choose from. A request without `max_tokens`
    ends by itself with the chance 1/`mean_tokens` at each token, unless `ignore_eos`.
    """

    def __init__(
        self, request: ScheduledRequest, token_ids: tuple[int, int], mean_tokens: int
    ) -> None:
        self._request = request
        self._first = token_ids[0]
        self._count = token_ids[1] - token_ids[0] + 1
        self._mean_tokens = mean_tokens
        sampling = request.sampling
        self._ends_by_itself = sampling.max_tokens is None and not sampling.ignore_eos
        self._state = zlib.crc32(struct.pack(f"<{len(request.tokens)}I", *request.tokens))
        self.unsent: list[int] = []

    def advance(self, scheduler: Scheduler) -> FinishReason | None:
        """Add one token to the request, unless it is over."""
        # Multiplicative hashing (Knuth, TAOCP 6.4): the middle bits of the product are mixed.
        draw = self._state * 0x9E3779B97F4A7C15 >> 24 & 0xFFFF_FFFF
        length = self._request.output_length
        may_end = self._ends_by_itself and length >= max(1, self._request.sampling.min_tokens)
        if may_end and draw % self._mean_tokens == 0:
            return "stop"
        token = self._first + (draw >> 8) % self._count
        self._state = zlib.crc32(struct.pack("<I", token), self._state)
        reason = scheduler.add_output(self._request, token)
        if reason != "stop":
            self.unsent.append(token)
        return reason

    def take(self) -> list[int]:
        """The tokens that have not been taken yet."""
        tokens, self.unsent = self.unsent, []
        return tokens
