"""The engine component: token ids in, a stream of token ids out.

Endpoints: `engine.generate` runs the model, `engine.info` says which model that is.
"""

import argparse
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from common.engines.start import add_engine_arguments, parse_engine_arguments, start_engine
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


@dynamo_worker()
async def worker(runtime: DistributedRuntime, args: argparse.Namespace, life: Lifecycle) -> None:
    try:
        engine = await start_engine(args)
    except (OSError, ValueError) as error:
        raise ComponentError(str(error)) from error
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
                    reason = output.finish_reason or reason
                    yield to_wire(output)
        except PipelineError as error:
            log.warning("refused: %s", error)
            reason = error.info.kind
            yield to_wire(EngineOutput(error=error.info))
        finally:
            log.debug("ended: %s after %d tokens", reason, tokens)

    async def engine_info(request: Any, context: Context) -> AsyncGenerator[dict[str, Any], None]:
        yield to_wire(info)

    try:
        await life.serve(
            runtime,
            {
                f"{args.namespace}.engine.generate": generate,
                f"{args.namespace}.engine.info": engine_info,
            },
            failed=engine.failed,
        )
    finally:
        await engine.close()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_arguments(parser)
    add_engine_arguments(parser)
    return parse_engine_arguments(parser)


if __name__ == "__main__":
    args = parse_args()
    run(worker, args, f"engine-{args.worker_id}")
