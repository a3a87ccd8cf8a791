"""Our simulated engine as a worker of Dynamo's own frontend (token ids in, token ids out).

With `--batch-items` it gathers what is ready into one item, as chapter 1's `engine.py` does.
"""

import argparse
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from common.engines.start import add_engine_arguments, parse_engine_arguments, start_engine
from common.protocol import EngineOutput, GenerateRequest, SamplingParams
from common.streams import Pace, gather_ready, merge_outputs
from common.worker import Lifecycle, add_common_arguments, run

from dynamo.llm import (
    ModelInput,
    ModelRuntimeConfig,
    ModelType,
    WorkerType,
    register_model,
)
from dynamo.runtime import Context, DistributedRuntime, dynamo_worker


@dynamo_worker()
async def worker(runtime: DistributedRuntime, args: argparse.Namespace, life: Lifecycle) -> None:
    engine = await start_engine(args)
    path = f"{args.namespace}.backend.generate"
    pace = Pace()

    async def generate(request: Any, context: Context) -> AsyncGenerator[dict[str, Any], None]:
        sampling = SamplingParams(max_tokens=request["stop_conditions"]["max_tokens"])
        outputs = engine.generate(GenerateRequest(request["token_ids"], sampling), context)
        batches = gather_ready(outputs, pace) if args.batch_items else one_by_one(outputs)
        async with aclosing(batches):
            async for ready in batches:
                output = merge_outputs(ready)
                item: dict[str, Any] = {"token_ids": output.token_ids}
                if output.finish_reason is not None:
                    item["finish_reason"] = output.finish_reason
                yield item

    async def register() -> None:
        config = ModelRuntimeConfig()
        config.total_kv_blocks = engine.info.total_blocks
        config.max_num_seqs = 1024
        config.max_num_batched_tokens = 8192
        await register_model(
            ModelInput.Tokens,
            ModelType.Chat,
            runtime.endpoint(path),
            args.model,
            "toy",
            worker_type=WorkerType.Aggregated,
            kv_cache_block_size=engine.info.block_size,
            runtime_config=config,
        )

    try:
        await life.serve(runtime, {path: generate}, ready=register)
    finally:
        await engine.close()


async def one_by_one(
    outputs: AsyncGenerator[EngineOutput, None],
) -> AsyncGenerator[list[EngineOutput], None]:
    async with aclosing(outputs):
        async for output in outputs:
            yield [output]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_arguments(parser)
    add_engine_arguments(parser)
    parser.add_argument("--batch-items", action="store_true")
    parser.set_defaults(backend="simulated")
    run(worker, parse_engine_arguments(parser), "peer-engine")
