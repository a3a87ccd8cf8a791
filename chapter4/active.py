"""The requests that were routed and are not finished: what each engine has still to compute.

An engine's own figures come a moment late and say nothing about how long its prompts are. The
router knows each prompt, and the processors tell when its first token came and when it ended.
"""

import itertools
import statistics

from chapter4.disaggregation import decode_id
from chapter4.engine_load import (
    ASSUMED_PREFILL_TOKENS_PER_S,
    LOST_AFTER_S,
    ActiveRequest,
    EngineLoad,
)
from common.protocol_replicas import Routed

# A request whose end nobody reports (its processor was killed) does not count for ever: it ends
# when its engine had fewer than were sent there all the time for LOST_AFTER_S, or after EXPIRE_S.
EXPIRE_S = 600.0
# Engines are alike, and only measured with noise, unless one is clearly faster or slower: small
# differences would send every prompt that is cached nowhere to the same one.
MEASURED_ENOUGH = 16  # prompts
CLEAR_RATIO = 1.5


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

    def add(self, routed: Routed, now: float) -> None:
        """A request was sent to an engine, or will be; see `ActiveRequest`."""
        self.finish(routed.request_id, now)
        self._expire(now)
        request = ActiveRequest(
            routed.instance,
            now,
            routed.own_tokens,
            tuple(routed.names),
            routed.own_blocks,
            waits=routed.waits,
            elsewhere=routed.elsewhere,
            session=routed.session,
            next_turn_s=routed.next_turn_s,
            retain_s=routed.retain_s,
        )
        if routed.session:
            for load in self._loads.values():
                load.come_back(routed.session)
        self.requests[routed.request_id] = request
        self.load(routed.instance).add(routed.request_id, request)

    def begin(self, request_id: str, now: float, *, computed: bool) -> ActiveRequest | None:
        """Another engine is done with its prompt: the request, if that was news."""
        request = self.requests.get(request_id)
        if request is None or not request.elsewhere:
            return None
        self.load(request.instance).begin(request_id, request, now, computed=computed)
        return request

    def first_token(self, request_id: str, now: float) -> None:
        """Its prompt is computed."""
        self.begin(request_id, now, computed=True)
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
        self.begin(decode_id(request_id), now, computed=False)
        load = self.load(request.instance)
        if request.in_prefill:
            load.end_prefill(request_id, request)
        else:
            load.leave(request, now)
        load.remove(request, now)

    def reconcile(self, instance: int, in_engine: int, now: float) -> list[str]:
        """Forget the requests that an engine, which has so many now, must have lost; their ids."""
        count = self.load(instance).lost(in_engine, now)
        if not count:
            return []
        oldest = [
            request_id
            for request_id, request in self.requests.items()
            if request.instance == instance
            and not request.elsewhere
            and now - request.since > LOST_AFTER_S
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
        for request_id in gone:
            if (waits := self.requests.get(decode_id(request_id))) is not None:
                self.begin(decode_id(request_id), waits.since, computed=False)

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
            self.finish(request_id, now)
