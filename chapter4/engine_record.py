"""One engine's health record: its outstanding requests, how the last ones went, its state."""

from collections import deque
from dataclasses import dataclass, field
from functools import partial

from chapter4.outliers import WINDOW_S, Decode, FirstToken, Latencies, Usual
from common.protocol_routing import HealthState

# A request whose end nobody reports (its processor was killed) does not count for ever.
EXPIRE_S = 600.0
MIN_DECODE_TOKENS = 2
MIN_OVERDUE_S = 3.0
OVERDUE_RATIO = 5.0  # times as long as a first token should take
FAILURES_WINDOW_S = 10.0
MIN_FAILURES = 3
MIN_FAILURE_SHARE = 0.2
QUARANTINE_S = 1.0  # doubles with each time
MAX_QUARANTINE_S = 30.0
FORGIVEN_AFTER_S = 60.0  # of health
RETRY_S = 2.0  # after a probe that went badly
PROBE_INTERVAL_S = 0.5
IDLE_CANARY_INTERVAL_S = 10.0
SUSPECT_CANARY_INTERVAL_S = 1.0


@dataclass(frozen=True, slots=True)
class Figures:
    """What the engine's own metrics say.

    `done` goes up whenever it gets on with its requests; `busy`: it has some. It can `serve`
    unless it failed a moment ago, or has only just come. Engines of one `kind`, the same model,
    role and pool, are compared with each other; of a `spare` kind all may be out, since
    others do their work as well. Without `canaries` it refuses what is no client's request.
    """

    worker_id: int
    kind: str
    silent: bool = False
    serves: bool = True
    spare: bool = False
    canaries: bool = True
    busy: bool = True
    waiting: int = 0
    done: int = 0


@dataclass(slots=True)
class Sent:
    """A request that was sent to the engine.

    `tokens` of prompts are to be computed before its first token, `own_tokens` of them its own.
    """

    time: float
    tokens: int
    own_tokens: int
    canary: bool
    waits: bool  # for a place among the running ones: no measure of how fast the engine is
    first_token: bool = False
    computed_before: int = 0
    batch: int = 1


@dataclass(slots=True)
class EngineRecord:
    """See `chapter4.health`; `badness` orders the reasons for quarantine."""

    worker_id: int
    kind: str
    since: float  # of the state
    used: float  # when something was last sent to it
    progress: float  # when it last got on with its requests
    state: HealthState = "healthy"
    why: str = ""
    until: float = 0.0  # not probed before
    strikes: int = 0
    badness: float = 0.0
    probed: int = 0
    suspect: bool = False
    last_canary: float = 0.0
    figures: Figures | None = None
    latencies: Latencies = field(default_factory=Latencies)
    sent: dict[str, Sent] = field(default_factory=dict)  # in the order of arrival
    computed: int = 0  # prompt tokens, of all requests
    ends: deque[tuple[float, bool]] = field(default_factory=deque)  # time, failed
    failed: deque[str] = field(default_factory=partial(deque, maxlen=64))  # the last ones

    @property
    def serves(self) -> bool:
        return self.figures is not None and self.figures.serves

    @property
    def is_spare(self) -> bool:
        return self.figures is not None and self.figures.spare

    @property
    def takes_canaries(self) -> bool:
        return self.figures is not None and self.figures.canaries

    @property
    def real_requests(self) -> int:
        return sum(not sent.canary for sent in self.sent.values())

    def see(self, figures: Figures, now: float) -> None:
        """Take its own figures."""
        before, self.figures = self.figures, figures
        self.latencies.forget_before(now - WINDOW_S)
        while self.ends and now - self.ends[0][0] > FAILURES_WINDOW_S:
            self.ends.popleft()
        if before is None or figures.done != before.done:
            self.progress = now
        if not figures.silent and not figures.busy and (before is None or not before.busy):
            # It has none, for two looks at it: whoever was to report their end is gone.
            old = [key for key, sent in self.sent.items() if now - sent.time > MIN_OVERDUE_S]
            for key in old:
                if not self.sent[key].canary:
                    del self.sent[key]
        while self.sent and now - next(iter(self.sent.values())).time > EXPIRE_S:
            del self.sent[next(iter(self.sent))]

    def take_first_token(self, request_id: str, seconds: float, now: float) -> None:
        sent = self.sent.get(request_id)
        if sent is None or sent.first_token:
            return
        sent.first_token = True
        self.progress = now
        self.computed += sent.own_tokens
        sent.computed_before = self.computed
        sent.batch = sum(other.first_token for other in self.sent.values())
        waiting = self.figures is not None and self.figures.waiting > 0
        if not sent.waits and not waiting:
            self.latencies.first_tokens.append(FirstToken(now, seconds, sent.tokens))

    def take_end(self, request_id: str, s_per_token: float, tokens: int, now: float) -> None:
        """It has all its tokens."""
        sent = self.sent.pop(request_id, None)
        if sent is None or not sent.first_token:
            return
        self.ends.append((now, False))
        if tokens < MIN_DECODE_TOKENS:
            return
        batch = max(sent.batch, 1 + sum(other.first_token for other in self.sent.values()))
        # One that is under way counts as a whole: rather too lenient than too strict.
        prefilled = self.computed - sent.computed_before + self.tokens_to_compute()
        sample = Decode(now, s_per_token, prefilled / (tokens - 1), batch)
        self.latencies.decodes.append(sample)

    def take_failure(self, request_id: str, now: float) -> None:
        self.sent.pop(request_id, None)
        name = request_id.rpartition("/")[0] or request_id
        if name in self.failed:
            return  # heard of it twice
        self.failed.append(name)
        self.ends.append((now, True))
        self.suspect = True

    def tokens_to_compute(self) -> int:
        return sum(sent.own_tokens for sent in self.sent.values() if not sent.first_token)

    def failing(self, others_share: float) -> str:
        """Why its failures are too many, or nothing."""
        failures, share = self.failures()
        if failures < MIN_FAILURES or share < max(MIN_FAILURE_SHARE, 2 * others_share):
            return ""
        return f"{failures} of its last {len(self.ends)} requests failed"

    def failures(self) -> tuple[int, float]:
        """How many of the last requests failed, and their share."""
        failures = sum(failed for _, failed in self.ends)
        return failures, failures / len(self.ends) if self.ends else 0.0

    def overdue_s(self, usual: Usual, now: float) -> float:
        """How long the next first token has been waited for, if that is too long, else 0.

        A request that waits for one that runs is not overdue as long as the engine gets on.
        """
        head = next((sent for sent in self.sent.values() if not sent.first_token), None)
        if head is None:
            return 0.0
        waited = now - max(head.time, self.progress)
        limit = OVERDUE_RATIO * usual.longest_first_token(head.own_tokens)
        return waited if waited > max(MIN_OVERDUE_S, limit) else 0.0

    def become(self, state: HealthState, why: str, now: float) -> None:
        self.state, self.why, self.since, self.probed = state, why, now, 0

    def strike(self, why: str, badness: float, now: float) -> None:
        """Put it into quarantine, for longer than the last time if that was not long ago."""
        if self.state == "healthy" and now - self.since > FORGIVEN_AFTER_S:
            self.strikes = 0
        self.until = now + min(QUARANTINE_S * 2**self.strikes, MAX_QUARANTINE_S)
        self.strikes += 1
        self.badness = badness
        self.become("quarantined", why, now)
        self.forget_evidence()

    def may_probe(self, now: float) -> bool:
        """Whether its quarantine has lasted long enough, and it is there."""
        there = self.figures is not None and not self.figures.silent and self.figures.serves
        return there and now >= self.until

    def canary_due(self, now: float) -> bool:
        if not (self.may_probe(now) and self.takes_canaries):
            return False
        if any(sent.canary for sent in self.sent.values()):
            return False
        unused = now - self.used
        if self.state != "healthy":
            return self.state == "quarantined" or unused >= PROBE_INTERVAL_S
        if self.suspect:  # busy or not: long answers tell late how they go
            return now - self.last_canary >= SUSPECT_CANARY_INTERVAL_S
        return not self.real_requests and unused >= IDLE_CANARY_INTERVAL_S

    def forget_evidence(self) -> None:
        """What was sent has testified; what comes of it now says nothing new."""
        self.latencies.clear()
        self.sent.clear()
        self.ends.clear()
        self.suspect = False
