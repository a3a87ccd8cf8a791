"""Call an endpoint from Python, as any process of a pipeline may.

    python call.py "What is the capital of France?"

asks `processor.process`, without a frontend, and prints what each item of the stream carries.
"""

import os
import sys

import common  # noqa: F401 (sets the runtime's environment)

import uvloop
from dynamo.runtime import DistributedRuntime, dynamo_worker


@dynamo_worker()
async def worker(runtime: DistributedRuntime, question: str) -> None:
    namespace = os.environ.get("DYN_NAMESPACE", "inference")
    client = await runtime.endpoint(f"{namespace}.processor.process").client()
    await client.wait_for_instances()
    request = {
        "model": "SmolLM2-135M-Instruct",
        "messages": [{"role": "user", "content": question}],
        "sampling": {"temperature": 0.0, "max_tokens": 20},
    }
    stream = await client.round_robin(request)
    async for chunk in stream:
        print(chunk.data())
    runtime.shutdown()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python call.py QUESTION")
    uvloop.run(worker(sys.argv[1]))
