"""An answer that survives the engines that make it: what is there, what is left, when to give up.

Needs no network and no clock of its own; times are in seconds of any clock.
"""

from dataclasses import dataclass, field

from chapter4.silence import ENDED_EARLY
from common.dispatch import NOT_LISTED, REFUSALS
from common.protocol import (
    EngineOutput,
    EngineTimings,
    ErrorInfo,
    FinishReason,
    GenerateRequest,
    PipelineError,
    SamplingParams,
)
from common.protocol_routing import ReportKind

DEFAULT_MIGRATION_LIMIT = 3
# So many engines may die over the same token of an answer before the next one is not risked. One
# may be chance, and two: those that went on with it may have shared an engine with the killer.
SURVIVED_DEATHS = 2


@dataclass
class Progress:
    """One request's answer so far.

    `limit` is how often it may go on with another engine; `migrations` counts how often it did
    since they were last taken. `worker_id` is that of the engine that made the last tokens.
    """

    prompt: list[int]
    sampling: SamplingParams
    context_length: int
    limit: int = DEFAULT_MIGRATION_LIMIT
    tokens: list[int] = field(default_factory=list)
    finished: bool = False
    migrations: int = 0
    worker_id: int | None = None
    _losses: int = 0
    _died_at: int | None = None  # how many tokens there were when an engine last died
    _deaths: int = 0  # there
    _resuming: bool = False
    _sent: float = 0.0
    _first_token: float | None = None  # of the engine that is at work
    _lost: EngineTimings = field(default_factory=lambda: EngineTimings(0.0, 0.0, 0.0))

    def request(self) -> GenerateRequest:
        """What an engine is asked that goes on from here."""
        return GenerateRequest([*self.prompt, *self.tokens], self.sampling, len(self.tokens))

    def tokens_left(self) -> int:
        room = self.context_length - len(self.prompt)
        limit = self.sampling.max_tokens
        return (room if limit is None else min(room, limit)) - len(self.tokens)

    def sent(self, now: float) -> None:
        """An engine got the request."""
        self._sent, self._first_token = now, None

    def add(self, output: EngineOutput, now: float) -> None:
        """Take note of an item, and make it one of the whole answer's."""
        if self._resuming and (output.token_ids or output.finish_reason):
            self._resuming = False
            self.migrations += 1
        if self.tokens:
            output.cached_tokens = None  # of what the client sent, the first engine has said it
        if output.worker_id is not None:
            self.worker_id = output.worker_id
        if output.token_ids and self._first_token is None:
            self._first_token = now
        self.tokens += output.token_ids
        self.finished = output.finish_reason is not None
        if output.timings is not None and not self.finished:
            # Another engine goes on, from now on.
            self._lost.queue_ms += output.timings.queue_ms
            self._lost.prefill_ms += output.timings.prefill_ms
            self._sent, self._first_token = now, now if output.token_ids else None
            output.timings = None
        elif output.timings is not None:
            output.timings = EngineTimings(
                output.timings.queue_ms + self._lost.queue_ms,
                output.timings.prefill_ms + self._lost.prefill_ms,
                output.timings.decode_ms + self._lost.decode_ms,
            )

    def take_migrations(self) -> int:
        taken, self.migrations = self.migrations, 0
        return taken

    def lose(self, failure: ErrorInfo, now: float, *, died: bool, refused: bool = False) -> bool:
        """The engine is lost, or cannot take the request; whether another one is to go on.

        That engine after engine `died` over the same token is taken for the request's doing: it is
        not to take the rest of them with it. Nothing is lost with one that `refused`.
        """
        full = failure.kind == "overloaded" and self.tokens
        if self.finished or not (is_fault(failure) or full):
            return False
        if refused:
            self._count_time(now)
            return True
        if died and not self.die():
            return False
        self._losses += 1
        if self._losses > self.limit:
            return False
        self._count_time(now)
        self._resuming = bool(self.tokens)
        return True

    def die(self) -> bool:
        """An engine died at work on this; False if that is not to be survived."""
        if self._died_at != len(self.tokens):
            self._died_at, self._deaths = len(self.tokens), 0
        self._deaths += 1
        return self._deaths <= (SURVIVED_DEATHS if self.tokens else 1)

    def last_item(self, now: float) -> EngineOutput | None:
        """The answer's end, if the engine was lost between the last token and the finish reason."""
        reason: FinishReason
        count, stop_ids = len(self.tokens), self.sampling.stop_token_ids
        if self.tokens and self.tokens[-1] in stop_ids and count > self.sampling.min_tokens:
            reason = "stop"
        elif self.tokens_left() <= 0:
            reason = "length"
        else:
            return None
        self.finished = True
        self._count_time(now)
        return EngineOutput(finish_reason=reason, timings=self._lost)

    def _count_time(self, now: float) -> None:
        """The time that an engine spent which cannot tell it any more."""
        began = now if self._first_token is None else self._first_token
        self._lost.prefill_ms += (began - self._sent) * 1e3
        self._lost.decode_ms += (now - began) * 1e3


def is_fault(failure: ErrorInfo) -> bool:
    """Whether it is the engine's doing, not the request's, and not that of too many requests."""
    return failure.kind in ("unavailable", "internal")


def failure_in(output: EngineOutput, *, stopped: bool) -> PipelineError | None:
    """Why an item is the engine's last but not the answer's; takes that out of the item.

    An engine that shuts down before its requests are done ends them as cancelled.
    """
    failure = None
    if output.error is not None:
        failure = PipelineError.of(output.error)
    elif output.finish_reason == "cancelled" and not stopped:
        failure = PipelineError("unavailable", "The engine was shut down.")
        output.finish_reason = output.timings = None
    output.error = None
    return failure


def verdict(failure: Exception | None) -> ReportKind:
    """What the router is told of an engine that did not finish the answer."""
    refused = isinstance(failure, PipelineError) and not is_fault(failure.info)
    return "finished" if refused else "failed"


def is_gone(failure: Exception) -> bool:
    """Whether the engine that failed is not to be chosen by others either."""
    return NOT_LISTED not in str(failure) and verdict(failure) == "failed"


def is_refusal(failure: Exception) -> bool:
    """Whether an engine that has made nothing did not begin: it is full, leaving, or not there."""
    if isinstance(failure, PipelineError):
        known = failure.info.kind in ("overloaded", "unavailable")
        return known and failure.info.message != ENDED_EARLY
    return any(part in str(failure) for part in REFUSALS)


def broken_off(error: PipelineError, made: int) -> PipelineError:
    """Why nobody can go on, after so many tokens."""
    if made == 0:
        return error
    message = f"The engine was lost after {made} tokens, and no other can go on: {error}"
    return PipelineError(error.info.kind, message, retry_after_s=error.info.retry_after_s)
