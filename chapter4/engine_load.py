"""What one engine has to do, as far as the router knows: the requests that were sent there."""

import bisect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

LOST_AFTER_S = 5.0
ASSUMED_PREFILL_TOKENS_PER_S = 8000.0  # until measured
MIN_MEASURED_TOKENS = 64  # what takes less is mostly overhead
AWAITED_S = 5.0
MAX_AWAY = 1024  # sessions of one engine
MEASURED_KEPT = 0.95  # of what was measured before, each time
NEW_ANSWER_SHARE = 0.1  # of an answer in the mean of their lengths in time


@dataclass(slots=True)
class ActiveRequest:
    """`names` are its full blocks', `own_blocks` those that no other request can share.

    One that `waits` came when the engine had no place for another running request. While
    another engine computes its prompt, that many tokens of it are `elsewhere`. Its `session` is
    expected back `next_turn_s` after its end, and is given up after `retain_s`.
    """

    instance: int
    since: float
    prefill_tokens: int
    names: tuple[int, ...]
    own_blocks: int
    in_prefill: bool = True
    waits: bool = False
    first_token: float = 0.0
    elsewhere: int = 0
    session: str = ""
    next_turn_s: float | None = None
    retain_s: float = 0.0


@dataclass(slots=True)
class EngineLoad:
    """What one engine has to do; see `WorkerView`."""

    prefill_tokens: int = 0
    prefill_requests: int = 0
    decode_requests: int = 0
    own_blocks: int = 0
    prefill_tokens_per_s: float = ASSUMED_PREFILL_TOKENS_PER_S
    measured_tokens_per_s: float = 0.0
    measurements: int = 0
    answer_s: float = 0.0
    requests_elsewhere: int = 0  # of those in prefill
    _shared: Counter[int] = field(default_factory=Counter)
    _prefills: dict[str, ActiveRequest] = field(default_factory=dict)  # in the order of arrival
    _last_first_token: float = 0.0
    _last_end: float = 0.0
    _measured_tokens: float = 0.0
    _measured_s: float = 0.0
    _too_many: int = 0  # requests that the engine did not have, at least, since
    _too_many_since: float = 0.0
    _away: dict[str, tuple[float, float]] = field(default_factory=dict)  # expected, given up

    @property
    def active_blocks(self) -> int:
        return len(self._shared) + self.own_blocks

    @property
    def prompt_blocks(self) -> int:
        return len(self._shared)

    def new_prompt_blocks(self, names: Sequence[int]) -> int:
        """How many of a prompt's full blocks, given by their names, no request here has."""
        if not names or names[0] not in self._shared:
            return len(names)
        # Who has a block has all those before it, so the first one that is missing is searched.
        return len(names) - bisect.bisect(names, 0, key=lambda name: name not in self._shared)

    def prefill_s(self, now: float) -> float:
        """How long the prompts will take that are not computed yet, first come first served."""
        if not self._prefills:
            return 0.0
        first = next(iter(self._prefills.values()))
        began = max(first.since, self._last_first_token)
        done = min((now - began) * self.prefill_tokens_per_s, first.prefill_tokens)
        return max(self.prefill_tokens - done, 0.0) / self.prefill_tokens_per_s

    def awaited(self, now: float) -> int:
        """How many sessions are expected back soon, or late."""
        if not self._away:
            return 0
        self._away = {name: times for name, times in self._away.items() if now < times[1]}
        return sum(expected - now < AWAITED_S for expected, _ in self._away.values())

    def leave(self, request: ActiveRequest, now: float) -> None:
        """Its session's next request is expected here, if it said so."""
        if request.session and request.next_turn_s is not None:
            self._away[request.session] = now + request.next_turn_s, now + request.retain_s
            if len(self._away) > MAX_AWAY:
                del self._away[next(iter(self._away))]

    def come_back(self, session: str) -> None:
        """It goes on, wherever."""
        self._away.pop(session, None)

    def add(self, request_id: str, request: ActiveRequest) -> None:
        self.prefill_tokens += request.prefill_tokens
        self.prefill_requests += 1
        self.own_blocks += request.own_blocks
        self._shared.update(request.names)
        if request.elsewhere:
            self.requests_elsewhere += 1
        else:
            self._prefills[request_id] = request

    def begin(self, request_id: str, request: ActiveRequest, now: float, *, computed: bool) -> None:
        """It comes only now; if its prompt was not computed elsewhere, that is to be done here."""
        if not computed:
            request.prefill_tokens += request.elsewhere
            self.prefill_tokens += request.elsewhere
        request.elsewhere, request.since = 0, now
        self.requests_elsewhere -= 1
        self._prefills[request_id] = request

    def end_prefill(self, request_id: str, request: ActiveRequest) -> None:
        request.in_prefill = False
        self._prefills.pop(request_id, None)
        self.prefill_tokens -= request.prefill_tokens
        self.prefill_requests -= 1
        self.decode_requests += 1

    def measure(self, request: ActiveRequest, now: float) -> None:
        """Learn how fast it computes prompts from one whose first token has come."""
        began = max(request.since, self._last_first_token)
        if request.waits:  # for one to end
            began = max(began, self._last_end)
        seconds = now - began
        self._last_first_token = now
        if request.prefill_tokens >= MIN_MEASURED_TOKENS and seconds > 0:
            # Sums, so that a long prompt weighs more than a short one, which says little.
            self._measured_tokens = MEASURED_KEPT * self._measured_tokens + request.prefill_tokens
            self._measured_s = MEASURED_KEPT * self._measured_s + seconds
            self.measured_tokens_per_s = self._measured_tokens / self._measured_s
            self.measurements += 1

    def lost(self, in_engine: int, now: float) -> int:
        """How many requests the engine, which has so many now, has long not had."""
        here = self.prefill_requests + self.decode_requests - self.requests_elsewhere
        too_many = here - in_engine
        if too_many <= 0 or not self._too_many:
            self._too_many, self._too_many_since = max(too_many, 0), now
            return 0
        self._too_many = min(self._too_many, too_many)
        if now - self._too_many_since < LOST_AFTER_S:
            return 0
        lost, self._too_many = self._too_many, 0
        return lost

    def remove(self, request: ActiveRequest, now: float) -> None:
        """Its prefill has ended."""
        if request.first_token and now > request.first_token:
            answer_s = now - request.first_token
            share = NEW_ANSWER_SHARE if self.answer_s else 1.0
            self.answer_s += share * (answer_s - self.answer_s)
        self._last_end = max(self._last_end, now)
        self.decode_requests -= 1
        self.requests_elsewhere -= request.elsewhere > 0
        self.own_blocks -= request.own_blocks
        for name in request.names:
            if self._shared[name] == 1:
                del self._shared[name]
            else:
                self._shared[name] -= 1
