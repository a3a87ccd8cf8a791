"""Engines in virtual time behind an `Admission`: a request runs for as long as it is told to."""

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from chapter3.admission import Admission, QueueSettings, Ticket
from chapter3.decision import Decision
from common.protocol import EngineMetrics
from tests.chapter3.fleet import FIRST, add_engine, fleet, route, source

import msgspec


@dataclass
class Engine:
    waiting: deque[str] = field(default_factory=deque)
    running: set[str] = field(default_factory=set)
    most_waiting: int = 0


class VirtualEngines:
    """`routed` has the ids of requests in the order in which they were routed."""

    def __init__(
        self,
        settings: QueueSettings,
        *,
        engines: int = 1,
        max_running: int = 1,
        service_s: float = 1.0,
    ) -> None:
        self.now = 0.0
        self.max_running, self.service_s = max_running, service_s
        self.selector = fleet("earliest_start", engines=0)
        self.engines: dict[int, Engine] = {}
        for worker_id in range(engines):
            self.add_engine(worker_id)
        self.tickets: dict[str, Ticket] = {}
        self.routed: list[str] = []
        self.refused: dict[str, tuple[str, float]] = {}  # why, and when
        self.admission = Admission(self.selector, settings, self._settled)
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = itertools.count()

    def add_engine(self, worker_id: int) -> None:
        known = source(worker_id, total_blocks=10_000)
        info = msgspec.structs.replace(known.info, max_running=self.max_running)
        known = msgspec.structs.replace(known, info=info)
        add_engine(self.selector, FIRST + worker_id, known, self.now)
        self.engines[FIRST + worker_id] = Engine()
        self.publish(FIRST + worker_id)

    def remove_engine(self, worker_id: int) -> None:
        self.selector.remove(FIRST + worker_id)
        self.admission.drain(self.now)

    def join_engine(self, worker_id: int) -> None:
        self.add_engine(worker_id)
        self.admission.drain(self.now)

    def publish(self, instance: int, used_blocks: int = 0) -> None:
        engine = self.engines[instance]
        figures = EngineMetrics(len(engine.running), len(engine.waiting), used_blocks, 10_000)
        self.selector.workers[instance].hear(figures, self.now)

    def ask(self, request_id: str, tokens: int = 8, **fields: Any) -> Ticket:
        """A request comes now; its prompt is like no other."""
        start = next(self._numbers) * 10_000
        prompt = list(range(start, start + tokens))
        wanted = route(prompt, request_id, **fields)
        ticket = self.admission.offer(wanted, self.now)
        self.tickets[request_id] = ticket
        return ticket

    def at(self, time: float, do: Callable[[], object]) -> None:
        heapq.heappush(self._events, (time, next(self._numbers), do))

    def run(self, until: float = 1000.0) -> None:
        """Let time pass; the queue is looked after only when it asks for it or something ends."""
        while True:
            event = self._events[0][0] if self._events else float("inf")
            due = max(self.admission.next_due(), self.now)
            if min(event, due) > until:
                self.now = until
                return
            if due < event:
                self.now = due
                self.admission.drain(self.now)
            else:
                self.now, _, do = heapq.heappop(self._events)
                do()

    def _settled(self, ticket: Ticket) -> None:
        request_id = ticket.wanted.request_id
        if not isinstance(ticket.outcome, Decision):
            assert ticket.refusal is not None
            self.refused[request_id] = (ticket.refusal, self.now)
            return
        self.routed.append(request_id)
        instance = ticket.outcome.worker.instance_id
        engine = self.engines[instance]
        engine.waiting.append(request_id)
        self._start_next(instance)
        engine.most_waiting = max(engine.most_waiting, len(engine.waiting))

    def _start_next(self, instance: int) -> None:
        engine = self.engines[instance]
        while engine.waiting and len(engine.running) < self.max_running:
            request_id = engine.waiting.popleft()
            engine.running.add(request_id)
            self.at(self.now + self.service_s, lambda: self._end(instance, request_id))  # noqa: B023

    def _end(self, instance: int, request_id: str) -> None:
        engine = self.engines[instance]
        engine.running.discard(request_id)
        self._start_next(instance)
        self.publish(instance)
        self.selector.active.first_token(request_id, self.now)
        self.selector.active.finish(request_id)
        self.admission.drain(self.now)
