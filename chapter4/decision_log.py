"""The last decisions and what became of them, for those who watch the router.

Of very many decisions only a sample is kept: a decision is an object of some kilobytes, and to
keep all of a busy router's would cost it more than to make them. What a watcher is shown is made
when it is shown, and only then.
"""

from collections import Counter, deque
from dataclasses import dataclass, field

from chapter4.decision import Decision
from chapter4.disaggregation import decode_id, is_prefill_id
from common.protocol_routing import RequestReport
from common.protocol_watch import RequestState

KEPT_PER_S = 24.0
KEPT_AT_ONCE = 16.0  # after a quiet while
RECENT = 64
OPEN_REQUESTS = 1024


@dataclass(slots=True)
class Logged:
    """A decision, the policies that made it, and what is known of its request."""

    number: int
    request_id: str
    decision: Decision
    policy: str
    shadow_policy: str
    queued_ms: float
    outcome: "Outcome"


@dataclass(slots=True)
class Outcome:
    """What became of a request; `changes` counts the reports about it.

    `prefill_ms` is how long another engine took to compute its prompt.
    """

    number: int
    state: RequestState = "sent"
    first_token_ms: float | None = None
    prefill_ms: float = 0.0
    output_tokens: int = 0
    ms_per_token: float = 0.0
    changes: int = 0

    @property
    def ended(self) -> bool:
        return self.state in ("finished", "failed")


@dataclass
class DecisionLog:
    """Remembers the last decisions that it kept, and how their requests go.

    `decided` counts all decisions, `chosen` those for an engine, also to compute a prompt only.
    """

    decided: int = 0
    chosen: Counter[int] = field(default_factory=Counter)  # decisions by instance
    recent: deque[Logged] = field(default_factory=lambda: deque(maxlen=RECENT))
    _open: dict[str, Outcome] = field(default_factory=dict)  # in the order of arrival
    _credit: float = KEPT_AT_ONCE
    _credited: float = 0.0

    def add(
        self,
        request_id: str,
        decision: Decision,
        policy: str = "",
        shadow_policy: str = "",
        queued_ms: float = 0.0,
    ) -> None:
        """A decision was made; one without a request id will never be reported about."""
        self.decided += 1
        self.chosen[decision.worker.instance_id] += 1
        if decision.prefill is not None:
            self.chosen[decision.prefill.worker.instance_id] += 1
        now = decision.snapshot.now
        self._credit += (now - self._credited) * KEPT_PER_S
        self._credit = min(self._credit, KEPT_AT_ONCE)
        self._credited = now
        if self._credit < 1.0:
            return
        self._credit -= 1.0
        outcome = Outcome(self.decided)
        self.recent.append(
            Logged(self.decided, request_id, decision, policy, shadow_policy, queued_ms, outcome)
        )
        if request_id:
            self._open[request_id] = outcome
            if len(self._open) > OPEN_REQUESTS:  # their ends were never reported
                del self._open[next(iter(self._open))]

    def report(self, report: RequestReport) -> None:
        """What a processor says of a request; of those that are not known it is ignored."""
        outcome = self._open.get(decode_id(report.request_id))
        if outcome is None:
            return
        if is_prefill_id(report.request_id):
            if report.kind == "first_token":
                outcome.prefill_ms = report.ms
            return
        outcome.changes += 1
        if report.kind == "first_token":
            outcome.state = "answering"
            outcome.first_token_ms = outcome.prefill_ms + report.ms
            return
        outcome.state = report.kind
        outcome.output_tokens = report.output_tokens
        outcome.ms_per_token = report.ms
        del self._open[report.request_id]

    def since(self, number: int) -> list[Logged]:
        """Those after decision `number` that were kept."""
        return [logged for logged in self.recent if logged.number > number]
