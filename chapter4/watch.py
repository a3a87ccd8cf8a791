"""`router.watch`: a few updates a second about all that the router knows, for a page.

However many decisions are made, an update shows those that the log kept, and their outcomes.
"""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

from chapter4.decision import Decision, policy_state
from chapter4.decision_log import DecisionLog, Logged, Outcome
from chapter4.hot_prefixes import HotPrefixes
from chapter4.scoring import best
from chapter4.selector import Selector
from chapter4.workers import Worker
from common.protocol import ErrorInfo, to_wire
from common.protocol_watch import (
    RouterUpdate,
    WatchedCandidate,
    WatchedDecision,
    WatchedOutcome,
    WatchedPrefix,
    WatchedQueue,
    WatchedWorker,
)

from dynamo.runtime import Context

INTERVAL_S = 0.25
PREFIXES_INTERVAL_S = 1.0
FOLLOWED = 200  # decisions whose outcomes a watcher is told
MAX_WATCHERS = 8
MAX_NAME = 80  # characters of what clients call things


class Watched:
    """What can be watched: the selector and its decisions; `router` is this instance's id."""

    def __init__(self, selector: Selector) -> None:
        self.selector = selector
        self.log = DecisionLog()
        selector.heard = self.log.report
        self.router = 0
        self.queue: Callable[[], WatchedQueue] = WatchedQueue
        self._prefixes = HotPrefixes()
        self._hottest: list[WatchedPrefix] = []
        self._hottest_at = -math.inf
        self._watchers = 0
        self._closed = asyncio.Event()

    def add(self, request_id: str, decision: Decision, queued_ms: float = 0.0) -> None:
        """A decision was just made."""
        shadow = self.selector.shadow
        shadow_name = shadow.name if shadow is not None else ""
        self.log.add(request_id, decision, self.selector.policy.name, shadow_name, queued_ms)

    async def aclose(self) -> None:
        """End all streams."""
        self._closed.set()

    async def watch(self, request: Any, context: Context) -> AsyncGenerator[dict[str, Any], None]:
        """The handler: updates until the watcher leaves or the router is closed."""
        if self._watchers >= MAX_WATCHERS:
            message = f"{MAX_WATCHERS} watch this router already; that is the limit."
            error = ErrorInfo("overloaded", message)
            yield to_wire(RouterUpdate(self._name(), error=error))
            return
        self._watchers += 1
        ends: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(context.async_killed_or_stopped()),
            asyncio.ensure_future(self._closed.wait()),
        ]
        watcher = Watcher(self)
        try:
            while not any(end.done() for end in ends):
                yield to_wire(watcher.update(time.monotonic()))
                await asyncio.wait(
                    ends, timeout=INTERVAL_S, return_when=asyncio.FIRST_COMPLETED
                )  # fmt: skip
        finally:
            self._watchers -= 1
            for end in ends:
                end.cancel()

    def update(self, now: float) -> RouterUpdate:
        """How the router does; without decisions."""
        selector, log = self.selector, self.log
        for gone in log.chosen.keys() - selector.workers.keys():
            del log.chosen[gone]
        if now - self._hottest_at >= PREFIXES_INTERVAL_S:
            self._hottest_at = now
            self._prefixes.count(log.recent, now)
            worker_ids = {
                key: known.source.info.worker_id for key, known in selector.workers.items()
            }
            self._hottest = self._prefixes.hottest(selector.index, worker_ids)
        return RouterUpdate(
            router=self._name(),
            at_s=now,
            decided=log.decided,
            policy=policy_state(selector.policy, selector.shadow),
            workers=sorted(
                (self._worker(worker, now) for worker in selector.workers.values()),
                key=lambda worker: (worker.worker_id, worker.instance),
            ),
            prefixes=self._hottest,
            queue=self.queue(),
        )

    def _name(self) -> str:
        return f"{self.router:x}"

    def _worker(self, worker: Worker, now: float) -> WatchedWorker:
        view = worker.view(
            [],
            0,
            prompt_tokens=1,
            cached_blocks=self.selector.index.block_count(worker.instance),
            load=self.selector.active.load(worker.instance),
            now=now,
        )
        state = worker.state(now)
        return WatchedWorker(
            instance=f"{worker.instance:x}",
            worker_id=view.worker_id,
            state=view.health if state == "ready" and view.health != "healthy" else state,
            chosen=self.log.chosen[worker.instance],
            role=worker.source.role,
            tags=sorted(view.tags),
            running=view.running,
            waiting=view.waiting,
            block_size=view.block_size,
            total_blocks=view.total_blocks,
            used_blocks=view.used_blocks,
            cached_blocks=view.cached_blocks,
            prefill_tokens=view.prefill_tokens,
            prefill_s=view.prefill_s,
            prefill_tokens_per_s=view.prefill_tokens_per_s,
            decode_requests=view.decode_requests,
            retained_blocks=view.retained_blocks,
            awaited=view.awaited,
        )


class Watcher:
    """What one watcher was shown already."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        self._decided = 0
        self._followed: dict[int, tuple[Outcome, int]] = {}  # by number; changes that were told

    def update(self, now: float) -> RouterUpdate:
        """What is new since the last update."""
        log = self._watched.log
        update = self._watched.update(now)
        # A new watcher sees some of the time before.
        shown = log.since(self._decided)
        update.new = log.decided - self._decided if self._decided else len(shown)
        self._decided = log.decided
        update.decisions = [watched_decision(logged) for logged in shown]
        self._followed |= {logged.number: (logged.outcome, 0) for logged in shown}
        update.outcomes = self._news()
        return update

    def _news(self) -> list[WatchedOutcome]:
        news = []
        for number, (outcome, told) in list(self._followed.items()):
            if outcome.changes != told:
                self._followed[number] = outcome, outcome.changes
                news.append(watched_outcome(outcome))
            if outcome.ended or len(self._followed) > FOLLOWED:
                del self._followed[number]
        return news


def watched_outcome(outcome: Outcome) -> WatchedOutcome:
    return WatchedOutcome(
        outcome.number,
        outcome.state,
        outcome.first_token_ms,
        outcome.output_tokens,
        outcome.ms_per_token,
    )


def watched_decision(logged: Logged) -> WatchedDecision:
    """The decision with every candidate's terms."""
    decision = logged.decision
    snapshot, scores, shadow = decision.snapshot, decision.scores, decision.shadow
    others = [score.total for at, score in enumerate(scores) if at != decision.chosen]
    theirs = None if shadow is None else best(shadow, snapshot)
    prefill = None if decision.prefill is None else decision.prefill.worker
    return WatchedDecision(
        number=logged.number,
        request_id=logged.request_id[:MAX_NAME],
        at_s=snapshot.now,
        policy=logged.policy,
        prompt_tokens=snapshot.request.prompt_tokens,
        prompt_blocks=decision.worker.prompt_blocks,
        expected_tokens=snapshot.request.output_tokens,
        queued_ms=logged.queued_ms,
        chosen=decision.chosen,
        margin=scores[decision.chosen].total - max(others) if others else None,
        candidates=[
            WatchedCandidate(
                view.worker_id,
                view.overlap_blocks,
                view.running,
                view.waiting,
                view.prefill_tokens,
                scores[at].total,
                dict(scores[at].terms),
                None if shadow is None else shadow[at].total,
                {} if shadow is None else dict(shadow[at].terms),
            )
            for at, view in enumerate(snapshot.workers)
        ],
        priority=snapshot.request.priority,
        tenant=snapshot.request.tenant[:MAX_NAME],
        session=snapshot.request.session[:MAX_NAME],
        agent_state=snapshot.request.agent_state,
        step=snapshot.request.step,
        next_turn_s=snapshot.request.next_turn_s,
        pool=snapshot.request.pool[:MAX_NAME],
        shadow_policy=logged.shadow_policy,
        shadow_chosen=theirs,
        shadow_regret=(
            0.0
            if shadow is None or theirs is None
            else shadow[theirs].total - shadow[decision.chosen].total
        ),
        prefill=None if prefill is None else prefill.worker_id,
        prefill_overlap=0 if prefill is None else prefill.overlap_blocks,
    )
