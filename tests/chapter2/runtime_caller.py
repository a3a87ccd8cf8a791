"""A component that calls endpoints for the tests: a JSON line in is a call, one out its answer.

python -m tests.chapter2.runtime_caller

In: `{"path": ..., "request": ..., "instance": ID or null}`. Out: `{"instances": [...]}` with
those that discovery lists if `request` is missing, `{"items": [...]}` with those of the stream
(bytes as base64) otherwise, or `{"error": ...}`.
"""

import asyncio
import sys
from typing import Any

from common.dispatch import dispatch

import msgspec
from dynamo.runtime import Client, Context, DistributedRuntime, dynamo_worker


@dynamo_worker()  # type: ignore[untyped-decorator]
async def worker(runtime: DistributedRuntime) -> None:
    clients: dict[str, Client] = {}
    while line := await asyncio.to_thread(sys.stdin.readline):
        call = msgspec.json.decode(line)
        path = call["path"]
        if path not in clients:
            clients[path] = await runtime.endpoint(path).client()
        try:
            reply = await answer(clients[path], call)
        except Exception as error:
            reply = {"error": str(error)}
        print(msgspec.json.encode(reply).decode(), flush=True)
    runtime.shutdown()


async def answer(client: Client, call: dict[str, Any]) -> dict[str, Any]:
    if "request" not in call:
        return {"instances": list(client.instance_ids())}
    async with asyncio.timeout(10):
        await client.wait_for_instances()
        if call["instance"] is None:
            context = Context()
            items = dispatch(
                lambda: client.round_robin(call["request"], annotated=False, context=context),
                context,
            )
            return {"items": [item async for item in items]}
        # Each endpoint has a watch of its own.
        while call["instance"] not in client.instance_ids():  # noqa: ASYNC110 (no event)
            await asyncio.sleep(0.01)
        stream = await client.direct(call["request"], call["instance"], annotated=False)
        return {"items": [item async for item in stream]}


if __name__ == "__main__":
    asyncio.run(worker())
