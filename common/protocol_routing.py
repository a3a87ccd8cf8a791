"""Messages of a router with policies: what a client may say about a request, and decisions.

processor --RouteRequest------> router.find_worker   <--RouteOutput--
processor --RequestReports----> router.report        <--{}-- (what became of routed requests)
scripts   --PolicyRequest-----> router.policy        <--PolicyState--
"""

from typing import Literal

from common.protocol import ErrorInfo, ProcessRequest
from common.protocol_router import FindWorkerRequest, WorkerState
from common.protocol_transfer import Role

import msgspec

HealthState = Literal["healthy", "quarantined", "probing"]
ReportKind = Literal["first_token", "finished", "failed"]
AgentState = Literal["", "planning", "calling", "answering"]


class RoutingHints(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """What the client says about a request for the router's use; see `chapter3.hints`.

    Of requests that wait, a higher `priority` goes first. `deadline_ms` is counted from when
    the frontend has the request to its first token. `output_tokens` is how many the client
    expects.

    An agent says what it does with the answer: plans, calls a tool with it, or gives it to its
    user. `next_turn_s` is when it expects to come back with a longer prompt; `step` counts
    its requests of one run from 1, so that above 1 it is in the midst of one. `pool` names the
    engines to prefer, by a tag of theirs.
    """

    priority: int = 0
    tenant: str = ""
    session: str = ""
    deadline_ms: float | None = None
    output_tokens: int | None = None
    agent_state: AgentState = ""
    next_turn_s: float | None = None
    step: int = 0
    pool: str = ""


class RoutedProcessRequest(ProcessRequest, omit_defaults=True, forbid_unknown_fields=True):
    """The input of `processor.process` where requests may carry hints."""

    hints: RoutingHints = msgspec.field(default_factory=RoutingHints)


class RouteRequest(FindWorkerRequest, omit_defaults=True, forbid_unknown_fields=True):
    """Asks which engine is to run this prompt.

    `request_id` names this attempt in the reports that follow; one that is sent again after a
    failure has another one. `max_tokens` bounds the output. `waited_ms` has passed since the
    frontend had the request. One that was `admitted` before goes without waiting again.
    """

    request_id: str = ""
    hints: RoutingHints = msgspec.field(default_factory=RoutingHints)
    max_tokens: int | None = None
    waited_ms: float = 0.0
    admitted: bool = False


class RoutedWorkerState(WorkerState, omit_defaults=True):
    """What the router believes about an engine; `health_reason` says why it is in doubt.

    `active` requests were sent to it and are not finished.
    """

    active: int = 0
    health: HealthState = "healthy"
    health_reason: str = ""
    tags: tuple[str, ...] = ()
    role: Role = "aggregated"


class ScoredCandidate(msgspec.Struct, omit_defaults=True):
    """An engine at the moment of a decision, and what the policy makes of it.

    The score is the sum of its `terms`; the highest wins. `shadow` is the shadow policy's score.
    """

    instance_id: int
    worker_id: int
    overlap_blocks: int
    running: int
    waiting: int
    prefill_tokens: int
    used_blocks: int
    health: HealthState = "healthy"
    score: float = 0.0
    terms: dict[str, float] = {}
    shadow: float | None = None


class PrefillChoice(msgspec.Struct, omit_defaults=True):
    """The engine that is to compute the prompt for another one, and why.

    What becomes of that is reported by this `request_id`.
    """

    request_id: str
    instance_id: int
    worker_id: int
    overlap_blocks: int = 0
    reason: str = ""


class RouteOutput(msgspec.Struct, omit_defaults=True):
    """The choice and why, or the `error`; `candidates` holds every engine considered.

    `overlap_blocks` and `overlap_tokens` are the part of the prompt that the chosen engine has
    cached, or will have when what was just routed to it is computed. With `prefill` another one
    computes the rest first. `queued_ms` is how long the request waited in the router.
    """

    instance_id: int = 0
    worker_id: int = 0
    overlap_blocks: int = 0
    overlap_tokens: int = 0
    queued_ms: float = 0.0
    reason: str = ""
    candidates: list[ScoredCandidate] = []
    prefill: PrefillChoice | None = None
    error: ErrorInfo | None = None


class RequestReport(msgspec.Struct, omit_defaults=True):
    """What became of a routed request, by its `request_id`.

    `first_token`: `ms` is the time since it was sent to the engine. `finished` and `failed`
    end it; `output_tokens` came, and `ms` is the mean time between two of them.
    """

    request_id: str
    instance_id: int
    kind: ReportKind
    ms: float = 0.0
    output_tokens: int = 0


class RequestReports(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """Some reports, in order."""

    reports: list[RequestReport]


class PolicyRequest(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """Changes the policy, the shadow policy or neither; `shadow=""` ends the shadow."""

    policy: str | None = None
    shadow: str | None = None


class PolicyState(msgspec.Struct, omit_defaults=True):
    """The policies at work, or the `error` for which nothing was changed.

    `failures` counts decisions that the policy could not make, because it raised an exception
    or gave no proper scores; a request is then sent to the least loaded engine. `failure` says
    what the last one was. `shadowed` decisions were scored by the shadow policy, too: in
    `disagreed` of them it would have chosen another engine, and `regret` is the mean of how
    much better that would have been, in its own score.
    """

    policy: str = ""
    shadow: str = ""
    failures: int = 0
    failure: str = ""
    shadow_failures: int = 0
    shadow_failure: str = ""
    shadowed: int = 0
    disagreed: int = 0
    regret: float = 0.0
    error: ErrorInfo | None = None
