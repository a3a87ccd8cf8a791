"""What a routing policy sees, and what it returns.

A policy is a plain function of a `Snapshot`: it returns one score per worker, in their order,
each a number or named terms whose sum is the score. The highest score wins; of equal ones, who
was chosen longest ago.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from chapter4.agent_hints import is_returning, retain_s, wanted_pool
from common.protocol_routing import AgentState, HealthState, RouteRequest

Score = float | Mapping[str, float]


@dataclass(frozen=True, slots=True)
class RequestView:
    """The request to route.

    `output_tokens` is how many are expected: the client's word, else the mean of the last
    answers, at most what it asked for. An agent says what it does with the answer, and when it
    expects to come back with a longer prompt: in `next_turn_s`, if it does; for `retain_s` the
    engine is to keep its blocks. `step` counts its requests of one task, of which those after the
    first are `returning`. Engines of this `pool`, by a tag like `pool=small`, are to be preferred.
    """

    prompt_tokens: int
    output_tokens: float = 128.0
    session: str = ""
    tenant: str = ""
    priority: int = 0
    agent_state: AgentState = ""
    next_turn_s: float | None = None
    retain_s: float = 0.0
    step: int = 0
    returning: bool = False
    pool: str = ""


@dataclass(frozen=True, slots=True)
class WorkerView:
    """An engine that may be chosen, with what was just routed to it counted in.

    Blocks are of `block_size` tokens. `prompt_blocks` is the prompt's length in them, the last
    one in part, of which `overlap_blocks` are cached. `running`, `waiting` and `used_blocks` are
    the engine's own figures and what was sent to it since. What follows is counted by the
    router: `prefill_tokens` of prompts sent there are not computed yet, `prefill_requests` is
    the number of these prompts, `decode_requests` have their first token, and `active_blocks`
    are those of all of them, shared ones counted once; `active_prompt_blocks` are the full ones
    of their prompts alone, and this prompt would add `new_prompt_blocks`. `prefill_s` is the
    time that the prefill will take by its `prefill_tokens_per_s`, which are measured, as is
    `answer_s`, the mean time from an answer's first token to its end. The engine runs
    `max_running` requests at once, if it says so; others wait for one of them to end. `turn`
    counts up with each decision and is that of the last one for this engine. `tags` are what
    the engine was started with; one whose `health` is `probing` takes one request at a time.
    `retained_blocks` it keeps for sessions that are to come back, while it has others to evict;
    `awaited` of those whose last request it had are expected within `AWAITED_S`, or late.
    """

    instance_id: int
    worker_id: int
    block_size: int
    prompt_blocks: float
    overlap_blocks: int
    running: int = 0
    waiting: int = 0
    used_blocks: int = 0
    total_blocks: int = 1
    cached_blocks: int = 0
    prefill_tokens: int = 0
    prefill_requests: int = 0
    decode_requests: int = 0
    active_blocks: int = 0
    active_prompt_blocks: int = 0
    new_prompt_blocks: int = 0
    prefill_s: float = 0.0
    prefill_tokens_per_s: float = 8000.0
    answer_s: float = 0.0
    max_running: int | None = None
    turn: int = 0
    tags: frozenset[str] = frozenset()
    health: HealthState = "healthy"
    retained_blocks: int = 0
    awaited: int = 0

    @property
    def new_tokens(self) -> float:
        """The prompt's tokens that this engine would have to compute."""
        return (self.prompt_blocks - self.overlap_blocks) * self.block_size

    @property
    def own_prefill_s(self) -> float:
        """How long the engine would compute what of the prompt it has not cached."""
        return self.new_tokens / self.prefill_tokens_per_s

    @property
    def place_s(self) -> float:
        """How long until so many of its requests have ended that one more can run, on average."""
        ahead = self.waiting
        if self.max_running is not None:
            ahead = max(ahead, self.running + self.waiting + 1 - self.max_running)
        return ahead * self.answer_s / max(self.running, 1)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One decision. `seed` is a new random number each time, for policies that leave it to chance.

    `now` is in seconds of a clock that only goes forward.
    """

    request: RequestView
    workers: tuple[WorkerView, ...]
    now: float
    seed: int = 0


Policy = Callable[[Snapshot], Sequence[Score]]


def request_view(wanted: RouteRequest, usual_output_tokens: float) -> RequestView:
    """What a policy sees of a request."""
    hints = wanted.hints
    expected = usual_output_tokens if hints.output_tokens is None else hints.output_tokens
    if wanted.max_tokens is not None:
        expected = min(expected, wanted.max_tokens)
    return RequestView(
        prompt_tokens=len(wanted.token_ids),
        output_tokens=expected,
        session=hints.session,
        tenant=hints.tenant,
        priority=hints.priority,
        agent_state=hints.agent_state,
        next_turn_s=hints.next_turn_s,
        retain_s=retain_s(hints),
        step=hints.step,
        returning=is_returning(hints),
        pool=wanted_pool(hints),
    )
