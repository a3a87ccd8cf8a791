"""The health of the engines: who gets no requests for a while, and when it gets some again.

    healthy --evidence--> quarantined --a probe went well--> probing --two more--> healthy
                               ^--------any evidence----------'

Evidence is silence (no metrics), failed requests, a first token that is overdue, or latencies
that are out of line with the other engines' (see `outliers`). A probe is a canary request, or,
while probing, a client's request, one at a time. Who is quarantined again soon is kept out for
longer each time. Needs no network and no clock: `now` is in seconds of any clock that only goes
forward.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from statistics import median

from chapter4.engine_record import MIN_FAILURES, RETRY_S, EngineRecord, Figures, Sent
from chapter4.outliers import MIN_SAMPLES, SLOW_RATIO, Slow, Usual, middle, slow, usual
from common.protocol_routing import HealthState
from common.telemetry import log

# Of the engines that could serve a model, at most this share is quarantined; those stay whose
# reasons weigh least: half a fleet that is slow is better than the other half alone.
MAX_QUARANTINED_SHARE = 0.5
PROBES = 2
# Who was not looking for so long (this process was stopped, say) knows nothing for a moment.
BLIND_AFTER_S = 1.5
BLIND_S = 1.0
JUDGE_SPEED_S = 1.0
MANY = 16  # engines, among which one hardly moves the middle

# How much worse a reason must be for one engine to take another's place in quarantine.
CLEARLY_WORSE = 1.5
SILENT, FAILING, OVERDUE = 1e6, 1e4, 1e2  # slow engines weigh as much as they are slow


class FleetHealth:
    """The records of all engines, by instance id.

    Without `canaries`, clients' requests are the only probes.
    """

    def __init__(self, slow_ratio: float = SLOW_RATIO, canaries: bool = True) -> None:
        self.slow_ratio = slow_ratio
        self.canaries = canaries
        self.engines: dict[int, EngineRecord] = {}
        self._usual: dict[int, Usual] = {}
        self._usual_of_all: dict[str, Usual] = {}
        self._speed_judged = -math.inf
        self._checked = -math.inf
        self._blind_until = 0.0

    def state(self, instance: int) -> HealthState:
        engine = self.engines.get(instance)
        return "healthy" if engine is None else engine.state

    def why(self, instance: int) -> str:
        """Why it is in this state, or what there is against one that stays healthy."""
        engine = self.engines.get(instance)
        return "" if engine is None else engine.why

    def may_serve(self, instance: int) -> bool:
        """Whether a client's request may go there now."""
        engine = self.engines.get(instance)
        if engine is None or engine.state == "healthy":
            return True
        return engine.state == "probing" and not engine.real_requests

    def sent(
        self,
        instance: int,
        request_id: str,
        now: float,
        *,
        tokens: int,
        own_tokens: int,
        waits: bool = False,
        canary: bool = False,
    ) -> None:
        """A request went to an engine; see `engine_record.Sent`."""
        if engine := self.engines.get(instance):
            engine.used, engine.last_canary = now, now if canary else engine.last_canary
            engine.sent[request_id] = Sent(now, tokens, own_tokens, canary, waits)

    def first_token(self, instance: int, request_id: str, seconds: float, now: float) -> None:
        """It came so long after the request was sent to the engine."""
        if engine := self.engines.get(instance):
            engine.take_first_token(request_id, seconds, now)

    def finished(
        self, instance: int, request_id: str, s_per_token: float, tokens: int, now: float
    ) -> None:
        """All its tokens came, with so long between two of them."""
        engine = self.engines.get(instance)
        sent = engine.sent.get(request_id) if engine else None
        if engine is None or sent is None:
            return
        engine.take_end(request_id, s_per_token, tokens, now)
        if engine.state != "healthy" and sent.first_token:
            self._probed(instance, engine, now)
        elif engine.suspect or sent.canary:
            engine.suspect = self._slow(instance, 1) is not None

    def ended(self, instance: int, request_id: str) -> None:
        """It is over, which says nothing about the engine."""
        if engine := self.engines.get(instance):
            engine.sent.pop(request_id, None)

    def failed(self, instance: int, request_id: str, now: float) -> None:
        """The engine did not take it, or broke its stream; a `/` and the attempt may follow."""
        if engine := self.engines.get(instance):
            engine.take_failure(request_id, now)
            if engine.state != "healthy":
                self._quarantine(engine, "a probe failed", FAILING, now)

    def remove(self, instance: int) -> None:
        """The engine has left."""
        self.engines.pop(instance, None)

    def check(self, figures: Mapping[int, Figures], now: float) -> None:
        """Judge every engine; to be called a few times a second."""
        for instance in self.engines.keys() - figures.keys():
            self.remove(instance)
        for instance, seen in figures.items():
            if instance not in self.engines:
                self.engines[instance] = EngineRecord(seen.worker_id, seen.kind, now, now, now)
            self.engines[instance].see(seen, now)
        if now - self._checked > BLIND_AFTER_S and math.isfinite(self._checked):
            self._blind_until = now + BLIND_S
        self._checked = now
        if now < self._blind_until:
            return
        judges_speed = now - self._speed_judged >= JUDGE_SPEED_S
        if judges_speed:
            self._speed_judged = now
            self._take_usual()
        for instance, engine in self.engines.items():
            reason, badness = self._evidence(instance, engine, now, speed=judges_speed)
            if engine.state != "quarantined":
                if reason and engine.serves:  # else nobody is sent there anyway
                    self._quarantine(engine, reason, badness, now)
                elif engine.state == "healthy" and judges_speed:
                    engine.why = ""
            elif reason:
                engine.why, engine.badness = reason, badness
            elif not (self.canaries and engine.takes_canaries) and engine.may_probe(now):
                self._probe(engine, now)
        self._keep_enough(now)

    def canaries_due(self, now: float) -> list[int]:
        """The engines that should have a canary request now."""
        return [key for key, engine in self.engines.items() if engine.canary_due(now)]

    def _take_usual(self) -> None:
        """Learn what is usual for each engine, and for all of a kind."""
        self._usual = {key: usual(engine.latencies) for key, engine in self.engines.items()}
        by_kind = defaultdict[str, list[Usual]](list)
        for key, engine in self.engines.items():
            by_kind[engine.kind].append(self._usual[key])
        many = {kind: known for kind, known in by_kind.items() if len(known) > MANY}
        self._usual_of_all = {kind: middle(known) for kind, known in many.items()}

    def _evidence(
        self, instance: int, engine: EngineRecord, now: float, *, speed: bool
    ) -> tuple[str, float]:
        """What there is against an engine, and how much that weighs."""
        if engine.figures is not None and engine.figures.silent:
            return "it sends no metrics", SILENT
        failures, _ = engine.failures()
        if failures >= MIN_FAILURES:
            others = [other for other in self.engines.values() if other is not engine]
            shares = [other.failures()[1] for other in others if other.ends]
            if failing := engine.failing(median(shares) if shares else 0.0):
                return failing, FAILING
        if waited := engine.overdue_s(self._others(instance), now):
            return f"no first token for {waited:.1f} s", OVERDUE
        engine.suspect |= speed and self._slow(instance, 1) is not None
        if speed and (found := self._slow(instance, MIN_SAMPLES)):
            return found.why, found.ratio
        return "", 0.0

    def _others(self, instance: int) -> Usual:
        """What is usual for the other engines of its kind."""
        kind = self.engines[instance].kind
        if kind in self._usual_of_all:
            return self._usual_of_all[kind]
        return middle([
            known
            for other, known in self._usual.items()
            if other != instance and other in self.engines and self.engines[other].kind == kind
        ])  # fmt: skip

    def _slow(self, instance: int, min_samples: int) -> Slow | None:
        latencies = self.engines[instance].latencies
        return slow(latencies, self._others(instance), self.slow_ratio, min_samples)

    def _probed(self, instance: int, engine: EngineRecord, now: float) -> None:
        """A request of a doubtful engine was answered."""
        if found := self._slow(instance, 1):
            self._quarantine(engine, found.why, found.ratio, now)
        elif engine.state == "quarantined":
            self._probe(engine, now)
        else:
            engine.probed += 1
            if engine.probed >= PROBES:
                engine.become("healthy", "", now)
                log.info("worker %d is healthy again", engine.worker_id)

    def _probe(self, engine: EngineRecord, now: float) -> None:
        engine.become("probing", f"back on probation; before, {engine.why}", now)
        log.info("worker %d is on probation: one request at a time", engine.worker_id)

    def _quarantine(self, engine: EngineRecord, why: str, badness: float, now: float) -> None:
        if engine.state == "quarantined":
            engine.forget_evidence()
            engine.until = max(engine.until, now + RETRY_S)
            engine.why, engine.badness = why, badness
        elif self._has_room(engine, badness, now):
            engine.strike(why, badness, now)
            log.warning("worker %d is quarantined for %.0f s at least: %s",
                        engine.worker_id, engine.until - now, why)  # fmt: skip
        else:
            engine.why = f"{why}, but enough engines are quarantined"

    def _has_room(self, engine: EngineRecord, badness: float, now: float) -> bool:
        """Whether it may be quarantined, in another one's place if need be."""
        if engine.state == "probing":
            return True
        out, room = self._out(engine.kind)
        if out and len(out) >= room and out[0].badness * CLEARLY_WORSE <= badness:
            self._release(out.pop(0), now)
        return len(out) < room

    def _out(self, kind: str) -> tuple[list[EngineRecord], int]:
        """Those that are not healthy, the least bad first, and how many these may be."""
        serving = [e for e in self.engines.values() if e.serves and e.kind == kind]
        out = sorted((e for e in serving if e.state != "healthy"), key=lambda e: e.badness)
        spare = all(e.is_spare for e in serving)
        return out, len(serving) if spare else int(len(serving) * MAX_QUARANTINED_SHARE)

    def _keep_enough(self, now: float) -> None:
        for kind in {engine.kind for engine in self.engines.values()}:
            out, room = self._out(kind)
            for engine in out[: max(len(out) - room, 0)]:
                self._release(engine, now)

    def _release(self, engine: EngineRecord, now: float) -> None:
        log.warning("worker %d serves again: too few others do", engine.worker_id)
        engine.become("healthy", f"{engine.why}, but too few others can serve", now)
