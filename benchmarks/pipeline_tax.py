"""What the pipeline costs: the same prompts on the engine in this process and through HTTP.

Both engines are the default one, on the real model, with the same settings. They are measured
in turn on the same prompts, which no earlier round has used, so that neither finds more in its
cache than the other. The tax is what HTTP, chat template, tokenisation, three processes and
the runtime's hops take: throughput, and time to the first token.
"""

import asyncio
import random
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from benchmarks.report import (
    GuardError,
    argument_parser,
    markdown_table,
    median,
    with_spread,
    write_result,
)
from benchmarks.sse_load import Answer, Load, run_load
from common.engines.llamacpp import LlamaCppEngine, LlamaCppSettings
from common.model_files import DEFAULT_MODEL
from common.protocol import ChatMessage, GenerateRequest, SamplingParams
from common.text import load_text_model
from launch.chapters import Options
from launch.children import Children
from launch.pipeline import pipeline
from launch.ports import free_port
from launch.servers import etcd_server, nats_server, server_environment

from dynamo.runtime import Context

ANSWER_TOKENS = 64
REQUESTS = {1: 8, 8: 24}  # by concurrency
WORDS = Path(random.__file__).read_text().split()


def questions(count: int, seed: int) -> list[str]:
    words = random.Random(seed)
    return [" ".join(words.choices(WORDS, k=40)) for _ in range(count)]


async def in_process(engine: LlamaCppEngine, prompts: list[list[int]], concurrency: int) -> Load:
    """Like `run_load`, without a pipeline."""
    waiting = iter(prompts)
    answers: list[Answer] = []

    async def one_at_a_time() -> None:
        for prompt in waiting:
            sampling = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, ignore_eos=True)
            sent, first, tokens, items = time.perf_counter(), 0.0, 0, 0
            async for output in engine.generate(GenerateRequest(prompt, sampling), Context()):
                first = first or time.perf_counter() - sent
                tokens += len(output.token_ids)
                items += 1
            answers.append(Answer(first, time.perf_counter() - sent, tokens, items))

    started = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(concurrency):
            tasks.create_task(one_at_a_time())
    return Load(answers, time.perf_counter() - started)


def check(load: Load, requests: int) -> None:
    tokens = {answer.tokens for answer in load.answers}
    if len(load.answers) != requests or tokens != {ANSWER_TOKENS}:
        raise GuardError(f"{len(load.answers)} of {requests} answers, of {tokens} tokens each")


async def measure(rounds: int, requests: dict[int, int]) -> dict[int, dict[str, list[Load]]]:
    """The loads of every round, by concurrency and by "engine" or "pipeline"."""
    text = load_text_model(DEFAULT_MODEL)
    loads: dict[int, dict[str, list[Load]]] = {
        concurrency: {"engine": [], "pipeline": []} for concurrency in requests
    }
    async with AsyncExitStack() as stack:
        children = stack.enter_context(Children())
        nats = await stack.enter_async_context(nats_server(children))
        etcd = await stack.enter_async_context(etcd_server(children))
        port = free_port()
        chapter = await stack.enter_async_context(
            pipeline(
                children,
                server_environment(nats.url, etcd.url),
                "chapter1",
                Options("pipeline-tax", port=port),
            )
        )
        await chapter.wait_ready()
        engine = await LlamaCppEngine.start(LlamaCppSettings())
        stack.push_async_callback(engine.close)
        for number in range(rounds + 1):
            for concurrency, count in requests.items():
                asked = questions(count, seed=1000 * number + concurrency)
                prompts = [text.encode(text.render_chat([ChatMessage("user", q)])) for q in asked]
                bodies: list[dict[str, Any]] = [
                    {
                        "model": text.name,
                        "messages": [{"role": "user", "content": question}],
                        "temperature": 0,
                        "max_tokens": ANSWER_TOKENS,
                        "ignore_eos": True,
                    }
                    for question in asked
                ]
                for name in ("engine", "pipeline") if number % 2 else ("pipeline", "engine"):
                    if name == "engine":
                        load = await in_process(engine, prompts, concurrency)
                    else:
                        load = await run_load(port, bodies, concurrency)
                    check(load, count)
                    if number > 0:  # the first round warms up
                        loads[concurrency][name].append(load)
                        print(
                            f"round {number}: {concurrency} at once, {name}: "
                            f"{load.tokens_per_s:.1f} tokens/s, "
                            f"TTFT p50 {median(load.ttfts_ms):.1f} ms",
                            file=sys.stderr,
                        )
    return loads


def compare(concurrency: int, loads: dict[str, list[Load]]) -> dict[str, Any]:
    engine, through = loads["engine"], loads["pipeline"]
    ratios = [p.tokens_per_s / e.tokens_per_s for e, p in zip(engine, through, strict=True)]
    added = [
        median(p.ttfts_ms) - median(e.ttfts_ms) for e, p in zip(engine, through, strict=True)
    ]  # fmt: skip
    return {
        "name": f"{concurrency} concurrent",
        "concurrency": concurrency,
        "engine_tokens_per_s": [round(load.tokens_per_s, 2) for load in engine],
        "pipeline_tokens_per_s": [round(load.tokens_per_s, 2) for load in through],
        "engine_ttft_p50_ms": [round(median(load.ttfts_ms), 2) for load in engine],
        "pipeline_ttft_p50_ms": [round(median(load.ttfts_ms), 2) for load in through],
        "ratio_tokens_per_s": [round(ratio, 4) for ratio in ratios],
        "added_ttft_p50_ms": [round(ms, 2) for ms in added],
    }


def table(rows: list[dict[str, Any]]) -> str:
    header = ["concurrent", "engine, tokens/s", "pipeline, tokens/s", "ratio", "added TTFT p50 ms"]
    return markdown_table(
        header,
        [
            [
                str(row["concurrency"]),
                with_spread(row["engine_tokens_per_s"], 1),
                with_spread(row["pipeline_tokens_per_s"], 1),
                with_spread(row["ratio_tokens_per_s"], 3),
                with_spread(row["added_ttft_p50_ms"], 1),
            ]
            for row in rows
        ],
    )


def main() -> None:
    args = argument_parser(__doc__).parse_args()
    rounds = 3 if args.quick else 7
    requests = {c: n // 2 if args.quick else n for c, n in REQUESTS.items()}
    loads = asyncio.run(measure(rounds, requests))
    rows = [compare(concurrency, loads[concurrency]) for concurrency in requests]
    print(table(rows))
    result = {
        "ratio_tokens_per_s": [median(row["ratio_tokens_per_s"]) for row in rows],
        "added_ttft_p50_ms": [median(row["added_ttft_p50_ms"]) for row in rows],
        "rows": rows,
        "answer_tokens": ANSWER_TOKENS,
    }
    write_result(args.json, result, "measured", list(range(1, rounds + 1)))


if __name__ == "__main__":
    main()
