"""The engine component: token ids in, a stream of token ids out.

Endpoints: `engine.generate` runs the model, `engine.info` says which model that is. For the
router it publishes over ZMQ what it has cached and how busy it is: `engine.kv_source` says where,
and `engine.kv_snapshot` gives what is cached now to who was not there when it happened.
`engine.clear_kv_blocks` forgets what no running request holds. With `--role prefill` it computes
prompts for engines with `--role decode`, which fetch the KV cache from it.
"""

import argparse
import asyncio
import os
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from typing import Any

from chapter4.disaggregation import add_role_argument
from common.engines.base import Engine
from common.engines.start import add_engine_arguments, parse_engine_arguments, start_engine
from common.kv_arguments import add_kv_arguments, kv_host
from common.kv_publisher import publishing
from common.kv_transfer.start import KvTransfer, add_kv_transfer_arguments, kv_transfer
from common.protocol import (
    EngineOutput,
    GenerateRequest,
    PipelineError,
    from_wire,
    to_wire,
)
from common.streams import Pace, gather_ready, merge_outputs
from common.telemetry import log, request_log
from common.worker import ComponentError, Lifecycle, add_common_arguments, run

from dynamo.runtime import Context, DistributedRuntime, dynamo_worker
from msgspec.structs import replace


@dynamo_worker()
async def worker(runtime: DistributedRuntime, args: argparse.Namespace, life: Lifecycle) -> None:
    async with AsyncExitStack() as stack:
        transfer = None
        if args.role != "aggregated" and args.backend == "llamacpp":
            kv = kv_transfer(args.kv_transfer, args.kv_host or kv_host())
            transfer = await stack.enter_async_context(kv)
        try:
            engine = await start_engine(args, transfer)
            if args.serve_as:
                engine.info = replace(engine.info, model=args.serve_as)
        except (OSError, ValueError) as error:
            raise ComponentError(str(error)) from error
        await serve(runtime, args, life, engine, transfer)


async def serve(
    runtime: DistributedRuntime,
    args: argparse.Namespace,
    life: Lifecycle,
    engine: Engine,
    transfer: KvTransfer | None = None,
) -> None:
    """Serve the engine until it is to stop, and close it; what it has lent is fetched first."""
    info = engine.info
    size = f"context {info.context_length} tokens, {info.total_blocks} blocks of {info.block_size}"
    log.info("%s on %s: %s", info.model, info.backend, size)
    pace = Pace()

    async def generate(request: Any, context: Context) -> AsyncGenerator[dict[str, Any], None]:
        log = request_log(context.id())
        tokens, reason = 0, "cancelled"
        try:
            generate_request = from_wire(request, GenerateRequest)
            log.debug("prompt of %d tokens", len(generate_request.token_ids))
            outputs = engine.generate(generate_request, context)
            async with aclosing(gather_ready(outputs, pace)) as batches:
                async for ready in batches:
                    output = merge_outputs(ready)
                    tokens += len(output.token_ids)
                    reason = "handover" if output.kv else output.finish_reason or reason
                    yield to_wire(output)
        except PipelineError as error:
            log.warning("refused: %s", error)
            reason = error.info.kind
            yield to_wire(EngineOutput(error=error.info))
        finally:
            log.debug("ended: %s after %d tokens", reason, tokens)

    async def engine_info(request: Any, context: Context) -> AsyncGenerator[dict[str, Any], None]:
        yield to_wire(info)

    async def kv_source(request: Any, context: Context) -> AsyncGenerator[dict[str, Any], None]:
        yield to_wire(publisher.source)

    async def kv_snapshot(request: Any, context: Context) -> AsyncGenerator[dict[str, Any], None]:
        for part in publisher.snapshot():
            yield to_wire(part)

    async def clear_kv_blocks(
        request: Any, context: Context
    ) -> AsyncGenerator[dict[str, Any], None]:
        await engine.clear_cache()
        yield to_wire(engine.metrics())

    drain_until = 0.0

    async def draining() -> None:
        nonlocal drain_until
        drain_until = time.monotonic() + life.drain_timeout_s

    host = args.kv_host or kv_host()
    async with publishing(
        engine, host, args.kv_events_port, args.metrics_port, args.tag
    ) as publisher:
        publisher.source.role = args.role
        try:
            await life.serve(
                runtime,
                {
                    f"{args.namespace}.engine.generate": generate,
                    f"{args.namespace}.engine.info": engine_info,
                    f"{args.namespace}.engine.kv_source": kv_source,
                    f"{args.namespace}.engine.kv_snapshot": kv_snapshot,
                    f"{args.namespace}.engine.clear_kv_blocks": clear_kv_blocks,
                },
                failed=engine.failed,
                draining=draining,
            )
            if transfer is not None:
                await _finish_lending(transfer, drain_until - time.monotonic())
        finally:
            await engine.close()


async def _finish_lending(transfer: KvTransfer, limit_s: float) -> None:
    """Those who are to decode would have to compute again what is not there any more."""
    lent_bytes = transfer.lender.lent_bytes
    if lent_bytes:
        log.info("draining: %d bytes of KV are still to be fetched", lent_bytes)
        try:
            async with asyncio.timeout(limit_s):
                await transfer.lender.nothing_lent()
        except TimeoutError:
            log.warning("%d bytes of KV were not fetched", transfer.lender.lent_bytes)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_arguments(parser)
    add_engine_arguments(parser)
    add_kv_arguments(parser)
    add_kv_transfer_arguments(parser)
    add_role_argument(parser)
    parser.add_argument(
        "--tag",
        action="append",
        default=os.environ.get("ENGINE_TAGS", "").split(),
        metavar="NAME",
        help="a word that says what kind of engine this is, which routing policies see; may "
        "repeat (env ENGINE_TAGS, separated by blanks). pool=small: for short structured steps; "
        "pool=large: for answers",
    )
    parser.add_argument(
        "--serve-as",
        default=os.environ.get("ENGINE_SERVE_AS", ""),
        metavar="MODEL",
        help="the name of another model, with the same tokenizer, for which this one may stand "
        "in; together with --tag pool=small (env ENGINE_SERVE_AS)",
    )
    return parse_engine_arguments(parser)


if __name__ == "__main__":
    args = parse_args()
    run(worker, args, f"engine-{args.worker_id}")
