"""What a router tells those who watch it: a few updates a second, for a page.

frontend --{}--> router.watch  <--RouterUpdate-- (a stream)

Instance ids are in hexadecimal, as in the logs: they are too large for a browser's numbers.
Times `_s` are of the router's own clock, which only goes forward; `at_s` is when the update
was made.
"""

from typing import Literal

from common.protocol import ErrorInfo
from common.protocol_routing import AgentState, PolicyState
from common.protocol_transfer import Role

import msgspec

RequestState = Literal["sent", "answering", "finished", "failed"]


class WatchedWorker(msgspec.Struct, omit_defaults=True):
    """An engine as the next decision would see it; see `WorkerView`.

    `state` is that of `WorkerState`, or what is known of its health. `chosen` counts the
    decisions for it, also those to compute a prompt for another engine. Of what it has cached it
    keeps `retained_blocks` for sessions; `awaited` sessions are expected back soon.
    """

    instance: str
    worker_id: int
    state: str
    chosen: int = 0
    role: Role = "aggregated"
    tags: list[str] = []
    running: int = 0
    waiting: int = 0
    block_size: int = 1
    total_blocks: int = 1
    used_blocks: int = 0
    cached_blocks: int = 0
    prefill_tokens: int = 0
    prefill_s: float = 0.0
    prefill_tokens_per_s: float = 0.0
    decode_requests: int = 0
    retained_blocks: int = 0
    awaited: int = 0


class WatchedPrefix(msgspec.Struct, omit_defaults=True):
    """A node of the radix tree where prompts part that came this way.

    `blocks` and `tokens` are counted from the first token of the prompt; `share` is that of all
    recent prompts; `workers` have all of it cached. `level` is how many of the hot prefixes
    this one continues.
    """

    name: str
    blocks: int
    tokens: int
    share: float
    workers: list[int] = []
    level: int = 0


class WatchedQueue(msgspec.Struct, omit_defaults=True):
    """Requests that wait in the router because every engine is full.

    `returning` of them go on with a task.
    """

    waiting: int = 0
    limit: int = 0
    oldest_ms: float = 0.0
    waiting_by_priority: dict[str, int] = {}
    waiting_by_tenant: dict[str, int] = {}
    refused: int = 0
    returning: int = 0


class WatchedCandidate(msgspec.Struct, omit_defaults=True):
    """An engine in one decision: what the policy saw, and the terms that add up to its score.

    `shadow` and `shadow_terms` are the shadow policy's.
    """

    worker_id: int
    overlap_blocks: int
    running: int
    waiting: int
    prefill_tokens: int
    score: float
    terms: dict[str, float]
    shadow: float | None = None
    shadow_terms: dict[str, float] = {}


class WatchedDecision(msgspec.Struct, omit_defaults=True):
    """One decision. `chosen` and `shadow_chosen` are positions in `candidates`.

    `margin` is how far the winner's score is above the second best one, `shadow_regret` how far
    the shadow policy's choice is above the winner, in the shadow's score. With `prefill`, which
    has `prefill_overlap` blocks of it cached, another engine computes the prompt. An agent says
    its state, its `step`, when it expects to come back, and which engines it prefers.
    """

    number: int
    request_id: str
    at_s: float
    policy: str
    prompt_tokens: int
    prompt_blocks: float
    expected_tokens: float
    queued_ms: float
    chosen: int
    margin: float | None
    candidates: list[WatchedCandidate]
    priority: int = 0
    tenant: str = ""
    session: str = ""
    shadow_policy: str = ""
    shadow_chosen: int | None = None
    shadow_regret: float = 0.0
    prefill: int | None = None
    prefill_overlap: int = 0
    agent_state: AgentState = ""
    step: int = 0
    next_turn_s: float | None = None
    pool: str = ""


class WatchedOutcome(msgspec.Struct, omit_defaults=True):
    """What has become of the request of decision `number`; `ms_per_token` is the mean ITL.

    `first_token_ms` is until the first token of the engine that was chosen; if another one
    computed the prompt, the time that it took is in it.
    """

    number: int
    state: RequestState = "sent"
    first_token_ms: float | None = None
    output_tokens: int = 0
    ms_per_token: float = 0.0


class RouterUpdate(msgspec.Struct, omit_defaults=True):
    """How one router does, or the `error` for which it cannot be watched.

    `decided` counts all decisions so far, `new` those since the last update; of very many,
    `decisions` is a sample, evenly spread in time. `outcomes` are news about decisions that this
    watcher was shown.
    """

    router: str
    at_s: float = 0.0
    decided: int = 0
    new: int = 0
    policy: PolicyState = msgspec.field(default_factory=PolicyState)
    workers: list[WatchedWorker] = []
    prefixes: list[WatchedPrefix] = []
    queue: WatchedQueue | None = None
    decisions: list[WatchedDecision] = []
    outcomes: list[WatchedOutcome] = []
    error: ErrorInfo | None = None


class RoutersUp(msgspec.Struct):
    """For the page: the instances of the router that are watched now, in hexadecimal."""

    routers: list[str]
