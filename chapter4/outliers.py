"""Which engine is slower than the others: latencies of the last seconds, compared like with like.

A slow answer alone says nothing: its prompt may have been long, or the engine busy. So times to
first token are compared by what had to be computed for them, and times between tokens by what
the engine did besides. Medians of medians, so that neither one slow answer nor one slow engine
moves what the others are measured by. Times are in seconds.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

WINDOW_S = 30.0
WINDOW_SAMPLES = 32
MIN_SAMPLES = 5  # of the engine that is judged
MIN_SAMPLES_OTHERS = 2
SLOW_RATIO = 3.0
# What is slower by less than this harms nobody, or is noise.
MIN_SLOWER_TTFT_S = 0.25
MIN_SLOWER_ITL_S = 0.03
SHORT_PROMPT_TOKENS = 64  # what has no more to compute takes an engine's overhead
MIN_EXPECTED_S = 1e-3  # less is beyond what is measured
UNKNOWN_FIRST_TOKEN_S = 1.0
UNKNOWN_S_PER_TOKEN = 0.01  # slower than any engine worth running
# An engine with a larger batch may be slower in proportion, but not more than this: batching
# pays on every engine.
BATCH_EXCUSE = 4.0


@dataclass(frozen=True, slots=True)
class FirstToken:
    """It came after `seconds`, in which `tokens` of prompts were to be computed."""

    time: float
    seconds: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Decode:
    """The mean time between two tokens, and what else the engine did in it.

    `prefill_tokens` of prompts were computed per output token, `batch` requests ran.
    """

    time: float
    seconds: float
    prefill_tokens: float
    batch: int


def _window() -> deque[FirstToken]:
    return deque(maxlen=WINDOW_SAMPLES)


def _decode_window() -> deque[Decode]:
    return deque(maxlen=WINDOW_SAMPLES)


@dataclass(slots=True)
class Latencies:
    """The last ones of one engine."""

    first_tokens: deque[FirstToken] = field(default_factory=_window)
    decodes: deque[Decode] = field(default_factory=_decode_window)

    def forget_before(self, time: float) -> None:
        while self.first_tokens and self.first_tokens[0].time < time:
            self.first_tokens.popleft()
        while self.decodes and self.decodes[0].time < time:
            self.decodes.popleft()

    def clear(self) -> None:
        self.first_tokens.clear()
        self.decodes.clear()


@dataclass(frozen=True, slots=True)
class Usual:
    """What an engine, or the middle of several, takes; None where too little is known."""

    first_token_s: float | None = None
    s_per_prompt_token: float | None = None
    s_between_tokens: float | None = None
    batch: float = 1.0

    def first_token(self, tokens: int) -> float | None:
        """The time to the first token when so many are to be computed."""
        if tokens < SHORT_PROMPT_TOKENS:
            return self.first_token_s
        if self.s_per_prompt_token is None:
            return None
        return (self.first_token_s or 0.0) + self.s_per_prompt_token * tokens

    def longest_first_token(self, tokens: int) -> float:
        """The same, on the safe side where too little is known."""
        overhead = UNKNOWN_FIRST_TOKEN_S if self.first_token_s is None else self.first_token_s
        per_token = self.s_per_prompt_token
        return overhead + tokens * (UNKNOWN_S_PER_TOKEN if per_token is None else per_token)


@dataclass(frozen=True, slots=True)
class Slow:
    """An engine takes `ratio` times as long as it should."""

    ratio: float
    why: str


def usual(latencies: Latencies) -> Usual:
    """What one engine takes."""
    short = [s.seconds for s in latencies.first_tokens if s.tokens < SHORT_PROMPT_TOKENS]
    per_token = [
        s.seconds / s.tokens for s in latencies.first_tokens if s.tokens >= SHORT_PROMPT_TOKENS
    ]
    prefill = _median(per_token)
    decodes = latencies.decodes
    between = [
        max(s.seconds - s.prefill_tokens * (prefill or 0.0), 0.0)
        for s in decodes
        if prefill is not None or not s.prefill_tokens
    ]
    batch = median(s.batch for s in decodes) if decodes else 1.0
    return Usual(_median(short), prefill, _median(between), batch)


def middle(engines: Sequence[Usual]) -> Usual:
    """The middle of several engines."""
    batches = [engine.batch for engine in engines if engine.s_between_tokens is not None]
    return Usual(
        _middle([engine.first_token_s for engine in engines]),
        _middle([engine.s_per_prompt_token for engine in engines]),
        _middle([engine.s_between_tokens for engine in engines]),
        median(batches) if batches else 1.0,
    )


def slow(latencies: Latencies, others: Usual, slow_ratio: float, min_samples: int) -> Slow | None:
    """Whether an engine is slow, measured by what is usual for the others."""
    first_tokens = [
        (sample.seconds, expected)
        for sample in latencies.first_tokens
        if (expected := others.first_token(sample.tokens)) is not None
    ]
    decodes = [
        (sample.seconds, expected)
        for sample in latencies.decodes
        if (expected := _expected_decode(sample, others)) is not None
    ]
    for pairs, what, min_slower in (
        (first_tokens, "to the first token", MIN_SLOWER_TTFT_S),
        (decodes, "between tokens", MIN_SLOWER_ITL_S),
    ):
        if len(pairs) < min_samples:
            continue
        ratio = median(seconds / max(expected, MIN_EXPECTED_S) for seconds, expected in pairs)
        if ratio >= slow_ratio and median(s - expected for s, expected in pairs) >= min_slower:
            ms = median(seconds for seconds, _ in pairs) * 1e3
            why = f"{ms:.0f} ms {what}, {ratio:.1f} times what the others would take"
            return Slow(ratio, why)
    return None


def _expected_decode(sample: Decode, others: Usual) -> float | None:
    if others.s_between_tokens is None:
        return None
    prefill = others.s_per_prompt_token
    if prefill is None and sample.prefill_tokens:
        return None
    batch = min(max(sample.batch / max(others.batch, 1.0), 1.0), BATCH_EXCUSE)
    return others.s_between_tokens * batch + sample.prefill_tokens * (prefill or 0.0)


def _median(values: Sequence[float]) -> float | None:
    return median(values) if len(values) >= MIN_SAMPLES_OTHERS else None


def _middle(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
