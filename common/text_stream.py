"""The engine's token ids as the text of an answer: detokenised, ended at a stop string, counted."""

import time
from collections import deque
from collections.abc import Iterable

from common.protocol import (
    EngineOutput,
    EngineTimings,
    PipelineError,
    PositionLogprobs,
    TextOutput,
    Timings,
    Usage,
)
from common.text import StopStrings, TextModel


class TextStream:
    """One answer.

    A stop string that ends within the first `min_tokens` tokens is text like any other. Log
    probabilities are held back with the text of their tokens. `started` is the
    `time.perf_counter()` at which the processor got the request. The control tokens `visible`
    have their text in the answer.
    """

    def __init__(
        self,
        model: TextModel,
        stop: list[str],
        *,
        min_tokens: int,
        prompt_tokens: int,
        started: float,
        visible: Iterable[str] = (),
    ) -> None:
        self._model = model
        self._detokenizer = model.detokenizer(visible)
        self._stop = StopStrings(stop) if stop else None
        self._min_tokens = min_tokens
        self._started = started
        self._tokenize_ms = _ms_since(started)
        self._usage = Usage(prompt_tokens, 0)
        self._worker_id: int | None = None
        self._made = 0  # characters
        self._shown = 0
        self._held: deque[tuple[int, PositionLogprobs]] = deque()  # by the end of their text

    def push(self, output: EngineOutput) -> TextOutput:
        """What an item of the engine adds to the answer; the last one has a finish reason.

        Raises:
            PipelineError: the engine's own, from an error item.
        """
        if output.error is not None:
            raise PipelineError.of(output.error)
        if output.worker_id is not None:
            self._worker_id = output.worker_id
        if output.cached_tokens is not None:
            self._usage.cached_tokens = output.cached_tokens
        logprobs: list[PositionLogprobs] = []
        if output.logprobs is not None:
            logprobs = self._model.logprobs(output.token_ids, output.logprobs)
        finish = output.finish_reason
        if self._stop is None:
            text, used = self._detokenizer.push(output.token_ids), len(output.token_ids)
        else:
            text, used, hit = self._until_stop(self._stop, output.token_ids, logprobs)
            if hit:
                finish = "stop"
            elif finish is not None:
                text += self._stop.flush()
            self._shown += len(text)
            logprobs = self._released()
        self._usage.completion_tokens += used
        result = TextOutput(text, used, logprobs or None, finish)
        if finish is not None:
            self.end(result, output.timings)
        return result

    def end(self, last: TextOutput, timings: EngineTimings | None = None) -> None:
        """Make `last` the answer's last item, with what such a one tells."""
        last.usage = self._usage
        last.worker_id = self._worker_id
        last.timings = Timings(self._tokenize_ms, _ms_since(self._started), timings)

    def _until_stop(
        self, stop: StopStrings, token_ids: list[int], logprobs: list[PositionLogprobs]
    ) -> tuple[str, int, bool]:
        """The text to show, how many of the tokens it took, and whether a stop string was hit."""
        shown = ""
        for used, token_id in enumerate(token_ids, 1):
            piece = self._detokenizer.push([token_id])
            self._made += len(piece)
            if logprobs:
                self._held.append((self._made, logprobs[used - 1]))
            early = self._usage.completion_tokens + used <= self._min_tokens
            piece, hit = stop.push(piece, ignore_hits=early)
            shown += piece
            if hit:
                return shown, used, True
        return shown, len(token_ids), False

    def _released(self) -> list[PositionLogprobs]:
        """The log probabilities of tokens whose text is out."""
        released = []
        while self._held and self._held[0][0] <= self._shown:
            released.append(self._held.popleft()[1])
        return released


def _ms_since(started: float) -> float:
    return round((time.perf_counter() - started) * 1e3, 3)
