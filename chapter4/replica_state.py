"""What one replica of the router knows of the others: their decisions, in its own figures.

Needs no network: `now` is in seconds of any clock that only goes forward.
"""

import uuid
from collections.abc import Callable, Iterable

from chapter4.selector import Selector
from common.protocol import PipelineError
from common.protocol_replicas import (
    EngineFailed,
    PolicyChanged,
    ReplicaMessage,
    Reported,
    Routed,
)
from common.protocol_routing import PolicyRequest, RequestReport
from common.telemetry import log

FORGET_FROM = 1000


class ReplicaState:
    """Applies what others say to `selector`; `change_policy` may raise a `PipelineError`."""

    def __init__(
        self, selector: Selector, change_policy: Callable[[Selector, PolicyRequest], None]
    ) -> None:
        # A topic of its own, because a restarted router may have the address of the one before.
        self.topic = f"router@{uuid.uuid4().hex}"
        self._selector = selector
        self._change_policy = change_policy
        self._policy_time = 0.0
        self._routed_by: dict[str, str] = {}  # request id -> the topic of another router

    def policy_changed(self, now_since_1970: float) -> PolicyChanged:
        """The policies were changed here, just now."""
        # Later than any change that is known, whatever the clocks of the machines say.
        self._policy_time = max(now_since_1970, self._policy_time + 1e-3)
        return self._policies()

    def snapshot(self, now: float) -> list[ReplicaMessage]:
        """All that a router that has just come must hear."""
        messages: list[ReplicaMessage] = []
        for request_id, request in self._selector.active.requests.items():
            messages.append(
                Routed(
                    request_id,
                    request.instance,
                    list(request.names),
                    overlap=0 if request.in_prefill else len(request.names),
                    own_tokens=request.prefill_tokens,
                    tokens=request.prefill_tokens,
                    own_blocks=request.own_blocks,
                    waits=True,  # how long it took says nothing to whom was not there
                    age_s=now - request.since,
                    router=self._routed_by.get(request_id, self.topic),
                    elsewhere=request.elsewhere,
                    session=request.session,
                    next_turn_s=request.next_turn_s,
                    retain_s=request.retain_s,
                )
            )
            if not request.in_prefill:
                ended = RequestReport(request_id, request.instance, "first_token")
                messages.append(Reported(ended))
        if self._policy_time:
            messages.append(self._policies())
        return messages

    def apply(self, topic: str, message: ReplicaMessage, now: float) -> None:
        """The router with this topic says this."""
        selector = self._selector
        if isinstance(message, Routed):
            known = message.request_id in selector.active.requests
            if not known and message.router != self.topic:
                self._routed_by[message.request_id] = message.router or topic
                selector.count(message, now - message.age_s)
        elif isinstance(message, Reported):
            selector.report(message.report, now)
            selector.changed()
        elif isinstance(message, EngineFailed):
            selector.health.failed(message.instance, message.request_id, now)
            selector.fail(message.instance)
        elif message.time > self._policy_time:
            self._policy_time = message.time
            self._adopt(message)
        if len(self._routed_by) > FORGET_FROM + 2 * len(selector.active.requests):
            self._routed_by = {
                key: router
                for key, router in self._routed_by.items()
                if key in selector.active.requests
            }

    def load(self, topic: str, messages: Iterable[ReplicaMessage], now: float) -> None:
        """Apply another router's snapshot; of its requests, those that are not in it are over."""
        listed = set[str]()
        for message in messages:
            if isinstance(message, Routed):
                listed.add(message.request_id)
            self.apply(topic, message, now)
        active = self._selector.active.requests
        for request_id, router in list(self._routed_by.items()):
            if router == topic and request_id in active and request_id not in listed:
                over = RequestReport(request_id, active[request_id].instance, "failed")
                self._selector.report(over, now)

    def _policies(self) -> PolicyChanged:
        shadow = self._selector.shadow
        names = self._selector.policy.name, shadow.name if shadow else ""
        return PolicyChanged(self._policy_time, *names)

    def _adopt(self, wanted: PolicyChanged) -> None:
        try:
            self._change_policy(self._selector, PolicyRequest(wanted.policy, wanted.shadow))
        except PipelineError as error:
            log.error("another router changed its policy, which cannot be done here: %s", error)
