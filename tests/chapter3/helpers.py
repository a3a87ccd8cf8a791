"""What the tests of the laboratory share: chapter 2's router as tests see it, and more."""

from typing import Any

from common.protocol_routing import PolicyState, RoutedWorkerState, RouteOutput
from tests.chapter1.helpers import MODEL
from tests.chapter2.helpers import Router as Chapter2Router
from tests.chapter2.helpers import RuntimeCaller, ask, prompt, start_caller

__all__ = ["Router", "RuntimeCaller", "ask", "prompt", "start_caller"]


class Router(Chapter2Router):
    """A pipeline's router and its engines, as the runtime shows them."""

    async def route(
        self, token_ids: list[int], instance: int | None = None, **fields: Any
    ) -> RouteOutput:
        """The choice of the router (if there are several: of this instance)."""
        path = f"{self.running.namespace}.router.find_worker"
        request = {"token_ids": token_ids, "model": MODEL, **fields}
        *_, output = await self.caller.call(path, request, RouteOutput, instance)
        return output

    async def policy(self, instance: int | None = None, **fields: Any) -> PolicyState:
        """Ask for a change of the policies; with no fields, for how they do."""
        path = f"{self.running.namespace}.router.policy"
        (state,) = await self.caller.call(path, fields, PolicyState, instance)
        return state

    async def workers(self, router: int | None = None) -> list[RoutedWorkerState]:
        """What the router (if there are several: this instance) believes, by worker id."""
        path = f"{self.running.namespace}.router.state"
        states = await self.caller.call(path, {}, RoutedWorkerState, router)
        return sorted(states, key=lambda state: state.worker_id)

    async def active(self, router: int | None = None) -> int:
        """How many requests the router believes to be under way."""
        return sum(state.active for state in await self.workers(router))
