"""For scripts that look into a running pipeline: connect, ask, go away."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any

from common.errors import ComponentError
from common.server_addresses import wait_for_servers

import uvloop
from dynamo.runtime import Client, DistributedRuntime

FIND_TIMEOUT_S = 3.0


def visit(worker: Callable[..., Awaitable[None]], *args: Any) -> None:
    """Run `worker(runtime, *args)`, a `@dynamo_worker()` function.

    Raises:
        ComponentError: NATS or etcd does not answer, or `worker` raised it.
    """
    uvloop.run(_visit(worker, *args))


async def _visit(worker: Callable[..., Awaitable[None]], *args: Any) -> None:
    try:
        async with asyncio.timeout(FIND_TIMEOUT_S):
            await wait_for_servers()
    except TimeoutError:
        nats, etcd = os.environ["NATS_SERVER"], os.environ["ETCD_ENDPOINTS"]
        raise ComponentError(
            f"no answer from NATS at {nats} and etcd at {etcd}; start them, or name others with "
            "NATS_SERVER and ETCD_ENDPOINTS"
        ) from None
    await worker(*args)


async def find(runtime: DistributedRuntime, namespace: str, endpoint: str) -> Client:
    """A client of `endpoint` ("router.state"), which has at least one instance.

    Raises:
        ComponentError: it has none.
    """
    client = await runtime.endpoint(f"{namespace}.{endpoint}").client()
    try:
        async with asyncio.timeout(FIND_TIMEOUT_S):
            await client.wait_for_instances()
    except TimeoutError:
        component = endpoint.partition(".")[0]
        raise ComponentError(
            f"no {component} with the endpoint {endpoint} is up in the namespace {namespace}; "
            "start one, or name another with --namespace"
        ) from None
    return client
