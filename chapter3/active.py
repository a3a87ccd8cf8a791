"""The requests that were routed and are not finished: what each engine has still to compute.

An engine's own figures come a moment late and say nothing about how long its prompts are. The
router knows each prompt, and the processors tell when its first token came and when it ended.
"""

import bisect
import itertools
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

# A request whose end nobody reports (its processor was killed) does not count for ever: it ends
# when its engine had fewer than were sent there all the time for LOST_AFTER_S, or after EXPIRE_S.
LOST_AFTER_S = 5.0
EXPIRE_S = 600.0
ASSUMED_PREFILL_TOKENS_PER_S = 8000.0  # until measured
MIN_MEASURED_TOKENS = 64  # what takes less is mostly overhead
MEASURED_KEPT = 0.95  # of what was measured before, each time
NEW_ANSWER_SHARE = 0.1  # of an answer in the mean of their lengths in time
# Engines are alike, and only measured with noise, unless one is clearly faster or slower: small
# differences would send every prompt that is cached nowhere to the same one.
MEASURED_ENOUGH = 16  # prompts
CLEAR_RATIO = 1.5


@dataclass(slots=True)
class ActiveRequest:
    """`names` are its full blocks', `own_blocks` those that no other request can share.

    One that `waits` came when the engine had no place for another running request.
    """

    instance: int
    since: float
    prefill_tokens: int
    names: tuple[int, ...]
    own_blocks: int
    in_prefill: bool = True
    waits: bool = False
    first_token: float = 0.0


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
    _shared: Counter[int] = field(default_factory=Counter)
    _prefills: dict[str, ActiveRequest] = field(default_factory=dict)  # in the order of arrival
    _last_first_token: float = 0.0
    _last_end: float = 0.0
    _measured_tokens: float = 0.0
    _measured_s: float = 0.0
    _too_many: int = 0  # requests that the engine did not have, at least, since
    _too_many_since: float = 0.0

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

    def add(self, request_id: str, request: ActiveRequest) -> None:
        self.prefill_tokens += request.prefill_tokens
        self.prefill_requests += 1
        self.own_blocks += request.own_blocks
        self._shared.update(request.names)
        self._prefills[request_id] = request

    def end_prefill(self, request_id: str, request: ActiveRequest) -> None:
        request.in_prefill = False
        del self._prefills[request_id]
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
        too_many = self.prefill_requests + self.decode_requests - in_engine
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
        self.own_blocks -= request.own_blocks
        for name in request.names:
            if self._shared[name] == 1:
                del self._shared[name]
            else:
                self._shared[name] -= 1


class ActiveRequests:
    """All of them, by request id; times are of any clock that only goes forward."""

    def __init__(self) -> None:
        self.requests: dict[str, ActiveRequest] = {}  # in the order of arrival
        self._loads: dict[int, EngineLoad] = {}
        self._usual_tokens_per_s = ASSUMED_PREFILL_TOKENS_PER_S

    def load(self, instance: int) -> EngineLoad:
        load = self._loads.get(instance)  # asked for each engine at each decision
        if load is None:
            load = self._loads[instance] = EngineLoad(prefill_tokens_per_s=self._usual_tokens_per_s)
        return load

    def add(
        self,
        request_id: str,
        instance: int,
        *,
        prefill_tokens: int,
        names: Sequence[int],
        own_blocks: int,
        now: float,
        waits: bool = False,
    ) -> None:
        """A request was sent to an engine."""
        self.finish(request_id, now)
        self._expire(now)
        request = ActiveRequest(
            instance, now, prefill_tokens, tuple(names), own_blocks, waits=waits
        )
        self.requests[request_id] = request
        self.load(instance).add(request_id, request)

    def first_token(self, request_id: str, now: float) -> None:
        """Its prompt is computed."""
        request = self.requests.get(request_id)
        if request is not None and request.in_prefill:
            load = self.load(request.instance)
            request.first_token = now
            load.measure(request, now)
            load.end_prefill(request_id, request)
            self._compare_speeds()

    def finish(self, request_id: str, now: float = 0.0) -> None:
        """It has ended, well or not; unknown ones are ignored."""
        request = self.requests.pop(request_id, None)
        if request is None:
            return
        load = self.load(request.instance)
        if request.in_prefill:
            load.end_prefill(request_id, request)
        load.remove(request, now)

    def reconcile(self, instance: int, in_engine: int, now: float) -> list[str]:
        """Forget the requests that an engine, which has so many now, must have lost; their ids."""
        count = self.load(instance).lost(in_engine, now)
        if not count:
            return []
        oldest = [
            request_id
            for request_id, request in self.requests.items()
            if request.instance == instance and now - request.since > LOST_AFTER_S
        ][:count]
        for request_id in oldest:
            self.finish(request_id, now)
        return oldest

    def remove_instance(self, instance: int) -> None:
        """The engine has left or lost all it had."""
        self._loads.pop(instance, None)
        gone = [key for key, request in self.requests.items() if request.instance == instance]
        for request_id in gone:
            del self.requests[request_id]

    def _compare_speeds(self) -> None:
        """Take an engine's own speed where it is clearly not the others'."""
        measured = [load for load in self._loads.values() if load.measurements]
        if not measured:
            return
        usual = statistics.median(load.measured_tokens_per_s for load in measured)
        self._usual_tokens_per_s = usual
        for load in self._loads.values():
            ratio = load.measured_tokens_per_s / usual
            differs = load.measurements >= MEASURED_ENOUGH and not (
                1 / CLEAR_RATIO < ratio < CLEAR_RATIO
            )
            load.prefill_tokens_per_s = load.measured_tokens_per_s if differs else usual

    def _expire(self, now: float) -> None:
        old = itertools.takewhile(
            lambda item: now - item[1].since > EXPIRE_S, self.requests.items()
        )
        for request_id, _ in list(old):
            self.finish(request_id)
