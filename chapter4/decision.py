"""One routing decision: the policy's, what the shadow policy makes of it, and its explanation."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from chapter4.policies import least_loaded
from chapter4.policy_loader import load_policy
from chapter4.scoring import PolicyError, Scored, best, reason, scored
from chapter4.snapshot import Policy, Snapshot, WorkerView
from common.protocol_routing import PolicyState, PrefillChoice, RouteOutput, ScoredCandidate
from common.telemetry import log

MAX_WARNINGS = 10  # about failures of one policy: its messages may differ each time
SLOW_S = 0.1


@dataclass(slots=True)
class Decision:
    """One decision, for those who want to know why; `shadow` has the shadow policy's scores.

    `tokens_hashes` are the prompt's, by the chosen engine's block size. With `prefill` another
    engine computes the prompt, a request of its own by the name of `prefill_id`.
    """

    snapshot: Snapshot
    scores: list[Scored]
    chosen: int
    reason: str
    shadow: list[Scored] | None = None
    tokens_hashes: Sequence[int] = ()
    prefill: "Decision | None" = None
    prefill_id: str = ""

    @property
    def worker(self) -> WorkerView:
        return self.snapshot.workers[self.chosen]


@dataclass
class PolicyInUse:
    """A policy, its name, and how it does; see `protocol_routing.PolicyState`."""

    name: str
    policy: Policy
    decisions: int = 0
    failures: int = 0
    failure: str = ""
    disagreed: int = 0
    regret_sum: float = 0.0
    slowest_s: float = 0.0
    _warnings: int = 0

    @classmethod
    def named(cls, name: str) -> "PolicyInUse":
        """The policy of that name.

        Raises:
            ValueError: there is none, or its file cannot be run.
        """
        return cls(name, load_policy(name))

    def fail(self, error: PolicyError) -> None:
        """A decision failed."""
        if str(error) != self.failure and self._warnings < MAX_WARNINGS:
            self._warnings += 1
            log.warning("policy %s: %s", self.name, error)
        self.failures += 1
        self.failure = str(error)

    def scored(self, snapshot: Snapshot) -> list[Scored]:
        """Each worker's score; raises as `scoring.scored`."""
        began = time.perf_counter()
        try:
            return scored(self.policy, snapshot)
        finally:
            seconds = time.perf_counter() - began
            if seconds > max(SLOW_S, 2 * self.slowest_s):
                self.slowest_s = seconds
                log.warning("policy %s took %.0f ms; the router does nothing else meanwhile",
                            self.name, seconds * 1e3)  # fmt: skip


def decide(snapshot: Snapshot, use: PolicyInUse, shadow: PolicyInUse | None = None) -> Decision:
    """Apply the policy; if it fails, the least loaded engine is chosen."""
    use.decisions += 1
    note = ""
    try:
        scores = use.scored(snapshot)
    except PolicyError as error:
        use.fail(error)
        note = f"{use.name} failed, the least loaded instead: "
        scores = scored(least_loaded.policy, snapshot)
    chosen = best(scores, snapshot)
    decision = Decision(snapshot, scores, chosen, note + reason(scores, snapshot, chosen))
    if shadow is not None:
        _score_in_shadow(shadow, decision)
    return decision


def _score_in_shadow(shadow: PolicyInUse, decision: Decision) -> None:
    shadow.decisions += 1
    try:
        decision.shadow = shadow.scored(decision.snapshot)
    except PolicyError as error:
        shadow.fail(error)
        return
    theirs = best(decision.shadow, decision.snapshot)
    shadow.disagreed += theirs != decision.chosen
    shadow.regret_sum += decision.shadow[theirs].total - decision.shadow[decision.chosen].total


def output(decision: Decision, *, queued_ms: float = 0.0) -> RouteOutput:
    """The decision as the router's answer."""
    worker = decision.worker
    return RouteOutput(
        instance_id=worker.instance_id,
        worker_id=worker.worker_id,
        overlap_blocks=worker.overlap_blocks,
        overlap_tokens=worker.overlap_blocks * worker.block_size,
        queued_ms=queued_ms,
        reason=decision.reason,
        candidates=candidates(decision),
        prefill=_prefill_choice(decision),
    )


def _prefill_choice(decision: Decision) -> PrefillChoice | None:
    if decision.prefill is None:
        return None
    worker = decision.prefill.worker
    return PrefillChoice(
        decision.prefill_id,
        worker.instance_id,
        worker.worker_id,
        worker.overlap_blocks,
        decision.prefill.reason,
    )


def candidates(decision: Decision) -> list[ScoredCandidate]:
    """Every engine considered, with its score and the shadow policy's."""
    return [
        ScoredCandidate(
            instance_id=view.instance_id,
            worker_id=view.worker_id,
            overlap_blocks=view.overlap_blocks,
            running=view.running,
            waiting=view.waiting,
            prefill_tokens=view.prefill_tokens,
            used_blocks=view.used_blocks,
            health=view.health,
            score=score.total,
            terms=dict(score.terms),
            shadow=None if decision.shadow is None else decision.shadow[position].total,
        )
        for position, (view, score) in enumerate(
            zip(decision.snapshot.workers, decision.scores, strict=True)
        )
    ]


def policy_state(use: PolicyInUse, shadow: PolicyInUse | None) -> PolicyState:
    """How the policies do."""
    if shadow is None:
        return PolicyState(use.name, failures=use.failures, failure=use.failure)
    compared = shadow.decisions - shadow.failures
    return PolicyState(
        use.name,
        shadow.name,
        failures=use.failures,
        failure=use.failure,
        shadow_failures=shadow.failures,
        shadow_failure=shadow.failure,
        shadowed=compared,
        disagreed=shadow.disagreed,
        regret=shadow.regret_sum / compared if compared else 0.0,
    )
