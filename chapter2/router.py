"""The router component: token ids in, the engine to send them to out.

Knows what every engine has cached (KV events) and how busy it is (metrics), both over ZMQ from
the engines themselves. It only decides: tokens never pass through it. Endpoints:
`router.find_worker`, and `router.state`, which says what it believes about the engines.
"""

import argparse
import asyncio
import os
from collections.abc import AsyncGenerator
from typing import Any, get_args

from chapter2.feed import following
from chapter2.selector import Selector
from common.protocol import PipelineError, from_wire, to_wire
from common.protocol_router import FindWorkerOutput, FindWorkerRequest, Policy, StateRequest
from common.telemetry import log, request_log
from common.worker import Lifecycle, add_common_arguments, run

from dynamo.runtime import Context, DistributedRuntime, dynamo_worker

POLICIES: tuple[str, ...] = get_args(Policy)
ENGINE_WAIT_S = 2.0


@dynamo_worker()
async def worker(runtime: DistributedRuntime, args: argparse.Namespace, life: Lifecycle) -> None:
    selector = Selector(args.policy)
    log.info("policy %s", args.policy)

    async def find_worker(request: Any, context: Context) -> AsyncGenerator[dict[str, Any], None]:
        try:
            wanted = from_wire(request, FindWorkerRequest)
            for instance in wanted.failed:
                selector.fail(instance)
            output = await select(wanted)
        except PipelineError as error:
            output = FindWorkerOutput(error=error.info)
        request_log(context.id()).debug("worker %d: %s", output.worker_id, output.reason)
        yield to_wire(output)

    async def select(wanted: FindWorkerRequest) -> FindWorkerOutput:
        excluded = {*wanted.excluded, *wanted.failed}
        none: PipelineError
        try:
            # A router that has just started knows its engines in a moment.
            async with asyncio.timeout(ENGINE_WAIT_S):
                while True:
                    try:
                        return selector.select(wanted.token_ids, wanted.model, excluded)
                    except PipelineError as error:
                        none = error
                    await feed.engine_synced()
        except TimeoutError:
            raise none from None

    async def state(request: Any, context: Context) -> AsyncGenerator[dict[str, Any], None]:
        cached = selector.index.blocks() if from_wire(request, StateRequest).blocks else {}
        for known in list(selector.workers.values()):  # they come and go between two items
            yield to_wire(selector.state(known, cached.get(known.instance, [])))

    async with following(runtime, args.namespace, selector) as feed:
        await life.serve(
            runtime,
            {
                f"{args.namespace}.router.find_worker": find_worker,
                f"{args.namespace}.router.state": state,
            },
            failed=feed.failed,
        )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_arguments(parser)
    parser.add_argument(
        "--policy",
        type=policy,
        metavar="|".join(POLICIES),
        default=os.environ.get("ROUTER_POLICY", "kv"),
        help="how to choose an engine: kv weighs what it has cached against how busy it is "
        "(env ROUTER_POLICY, %(default)s)",
    )
    return parser.parse_args()


def policy(text: str) -> str:
    if text not in POLICIES:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(POLICIES)}")
    return text


if __name__ == "__main__":
    run(worker, parse_args(), "router")
