"""The life of a component, with a runtime that does as the tests like."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, cast

from common.worker import ComponentError, Lifecycle

import pytest
from dynamo.runtime import DistributedRuntime


class NeverListed:
    """A runtime and its only endpoint, which ends, or fails, before anybody lists it."""

    def __init__(self, failure: Exception | None) -> None:
        self._failure = failure

    def endpoint(self, path: str) -> "NeverListed":
        return self

    async def serve_endpoint(self, handler: Any) -> None:
        await asyncio.sleep(0)
        if self._failure is not None:
            raise self._failure

    async def client(self) -> "NeverListed":
        return self

    def connection_id(self) -> int:
        return 1

    def instance_ids(self) -> list[int]:
        return []


async def handler(request: Any, context: Any) -> AsyncGenerator[Any, None]:
    yield {}


@pytest.mark.parametrize(
    ("failure", "why"),
    [(None, "not listed: the etcd lease is lost"), (ValueError("no etcd"), "not listed: no etcd")],
)
async def test_a_component_that_cannot_be_listed_ends(failure: Exception | None, why: str) -> None:
    """It would be neither ready nor gone."""
    runtime = cast(DistributedRuntime, NeverListed(failure))
    with pytest.raises(ComponentError, match=why):
        await Lifecycle(1.0).serve(runtime, {"a.b.c": handler})
