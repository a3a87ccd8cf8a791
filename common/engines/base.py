"""The interface of every engine backend."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Protocol

from common.kv import KvEvent
from common.protocol import EngineInfo, EngineMetrics, EngineOutput, GenerateRequest


class RequestContext(Protocol):
    """The part of `dynamo.runtime.Context` that an engine uses."""

    def id(self) -> str | None: ...

    def is_stopped(self) -> bool: ...

    def async_killed_or_stopped(self) -> Awaitable[bool]: ...


class Engine(Protocol):
    """Token ids in, token ids out.

    `failed` completes, with the exception as its result, when the engine can no longer serve;
    the component that owns the engine then ends its process with a non-zero status.
    `subscribe` registers a callback that gets every batch of KV events in order, on the
    engine's own thread; it must not block.
    """

    info: EngineInfo
    failed: asyncio.Future[BaseException]

    def generate(
        self, request: GenerateRequest, context: RequestContext
    ) -> AsyncGenerator[EngineOutput, None]:
        """Stream a request's tokens; stops within one decode step of `context` stopping.

        Raises:
            PipelineError: the prompt does not fit, the queue is full, the JSON schema cannot
                be compiled, or the engine failed.
        """
        ...

    def subscribe(self, callback: Callable[[list[KvEvent]], None]) -> None: ...

    def metrics(self) -> EngineMetrics: ...

    async def clear_cache(self) -> None:
        """Forget every block that no running request holds."""
        ...

    async def close(self) -> None:
        """Stop the engine and free its memory; running requests end as cancelled."""
        ...
