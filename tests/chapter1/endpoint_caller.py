"""A component that calls `frontend.chat_completions` through the runtime and prints the chunks.

python -m tests.chapter1.endpoint_caller NAMESPACE REQUEST_JSON [CANCEL_AFTER]
"""

import asyncio
import json
import sys
from typing import Any

import common  # noqa: F401 (the runtime's settings)

from dynamo.runtime import Context, DistributedRuntime, dynamo_worker


@dynamo_worker()  # type: ignore[untyped-decorator]
async def worker(runtime: DistributedRuntime, namespace: str, request: Any, cancel: int) -> None:
    client = await runtime.endpoint(f"{namespace}.frontend.chat_completions").client()
    await client.wait_for_instances()
    context = Context("called-by-runtime")
    received = 0
    async for chunk in await client.round_robin(request, annotated=False, context=context):
        print(json.dumps(chunk), flush=True)
        received += 1
        if received == cancel:
            context.stop_generating()
    runtime.shutdown()


if __name__ == "__main__":
    cancel = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    asyncio.run(worker(sys.argv[1], json.loads(sys.argv[2]), cancel))
