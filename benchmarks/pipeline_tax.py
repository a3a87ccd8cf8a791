"""What the pipeline costs: the same prompts on the engine in this process and through HTTP.

Both engines are the default one, on the real model, with the same settings. They take turns: 1
or 8 prompts are asked at once of the one, and when all are answered, of the other. No prompt is
used twice, so neither engine finds more in its cache than the other. The tax is what HTTP, chat
template, tokenisation, three processes and the runtime's hops take: throughput, and time to the
first token, which is compared turn by turn because the machine's own speed drifts.
"""

import asyncio
import random
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
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
from common.text import TextModel, load_text_model
from launch.chapters import Options
from launch.children import Children
from launch.pipeline import pipeline
from launch.ports import free_port
from launch.servers import etcd_server, nats_server, server_environment

from dynamo.runtime import Context

# Short, or the engine's own prefill, and its noise, would bury what the pipeline adds.
PROMPT_TOKENS = 32
PROMPT_WORDS = 12
ANSWER_TOKENS = 64
TURNS = {1: 12, 8: 4}  # of each round, by concurrency
WORDS = Path(random.__file__).read_text().split()


def questions(text: TextModel, count: int, seed: int) -> list[str]:
    """Questions of PROMPT_TOKENS tokens each, so that it does not matter who is served first."""
    words = random.Random(seed)
    found: list[str] = []
    while len(found) < count:
        question = " ".join(words.choices(WORDS, k=PROMPT_WORDS))
        if len(prompt_of(text, question)) == PROMPT_TOKENS:
            found.append(question)
    return found


def prompt_of(text: TextModel, question: str) -> list[int]:
    return text.encode(text.render_chat([ChatMessage("user", question)]))


async def in_process(engine: LlamaCppEngine, prompts: list[list[int]]) -> Load:
    """Like `run_load`, without a pipeline; all prompts at once."""
    sampling = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, ignore_eos=True)

    async def ask(prompt: list[int]) -> Answer:
        sent, first, tokens, items = time.perf_counter(), 0.0, 0, 0
        async for output in engine.generate(GenerateRequest(prompt, sampling), Context()):
            first = first or time.perf_counter() - sent
            tokens += len(output.token_ids)
            items += 1
        return Answer(first, time.perf_counter() - sent, tokens, items)

    started = time.perf_counter()
    answers = await asyncio.gather(*[ask(prompt) for prompt in prompts])
    return Load(list(answers), time.perf_counter() - started)


def check(load: Load, requests: int) -> None:
    tokens = {answer.tokens for answer in load.answers}
    if len(load.answers) != requests or tokens != {ANSWER_TOKENS}:
        raise GuardError(f"{len(load.answers)} of {requests} answers, of {tokens} tokens each")


@dataclass(frozen=True)
class Turn:
    """The same prompts on both."""

    engine: Load
    pipeline: Load

    @property
    def added_ttft_ms(self) -> float:
        return median(self.pipeline.ttfts_ms) - median(self.engine.ttfts_ms)


async def measure(rounds: int, turns: dict[int, int]) -> dict[int, list[list[Turn]]]:
    """The turns of every round, by concurrency."""
    text = load_text_model(DEFAULT_MODEL)

    async def one_turn(concurrency: int, seed: int) -> Turn:
        asked = questions(text, concurrency, seed)
        prompts = [prompt_of(text, question) for question in asked]
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
        if seed % 2:
            alone = await in_process(engine, prompts)
            through = await run_load(port, bodies, concurrency)
        else:
            through = await run_load(port, bodies, concurrency)
            alone = await in_process(engine, prompts)
        check(alone, concurrency)
        check(through, concurrency)
        return Turn(alone, through)

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
        for concurrency in turns:
            await one_turn(concurrency, seed=0)  # warms up
        measured: dict[int, list[list[Turn]]] = {concurrency: [] for concurrency in turns}
        for number in range(1, rounds + 1):
            for concurrency, count in turns.items():
                seeds = [10_000 * number + 100 * concurrency + turn for turn in range(count)]
                measured[concurrency].append([await one_turn(concurrency, s) for s in seeds])
                print(f"round {number} of {rounds}, {concurrency} at once: done", file=sys.stderr)
    return measured


def tokens_per_s(loads: list[Load]) -> float:
    tokens = sum(answer.tokens for load in loads for answer in load.answers)
    return round(tokens / sum(load.seconds for load in loads), 2)


def compare(concurrency: int, rounds: list[list[Turn]]) -> dict[str, Any]:
    engine = [tokens_per_s([turn.engine for turn in turns]) for turns in rounds]
    through = [tokens_per_s([turn.pipeline for turn in turns]) for turns in rounds]
    return {
        "name": f"{concurrency} concurrent",
        "concurrency": concurrency,
        "engine_tokens_per_s": engine,
        "pipeline_tokens_per_s": through,
        "engine_ttft_p50_ms": [
            round(median([median(turn.engine.ttfts_ms) for turn in turns]), 1) for turns in rounds
        ],
        "ratio_tokens_per_s": [
            round(p / e, 4) for p, e in zip(through, engine, strict=True)
        ],
        "added_ttft_p50_ms": [
            round(median([turn.added_ttft_ms for turn in turns]), 2) for turns in rounds
        ],
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    header = ["concurrent", "engine, tokens/s", "pipeline, tokens/s", "ratio"]
    header += ["engine, TTFT p50 ms", "added TTFT p50 ms"]
    return markdown_table(
        header,
        [
            [
                str(row["concurrency"]),
                with_spread(row["engine_tokens_per_s"], 1),
                with_spread(row["pipeline_tokens_per_s"], 1),
                with_spread(row["ratio_tokens_per_s"], 3),
                with_spread(row["engine_ttft_p50_ms"]),
                with_spread(row["added_ttft_p50_ms"], 1),
            ]
            for row in rows
        ],
    )


def main() -> None:
    args = argument_parser(__doc__).parse_args()
    rounds = 3 if args.quick else 7
    turns = {c: n // 4 if args.quick else n for c, n in TURNS.items()}
    measured = asyncio.run(measure(rounds, turns))
    rows = [compare(concurrency, measured[concurrency]) for concurrency in turns]
    print(table(rows))
    result = {
        "ratio_tokens_per_s": [median(row["ratio_tokens_per_s"]) for row in rows],
        "added_ttft_p50_ms": [median(row["added_ttft_p50_ms"]) for row in rows],
        "rows": rows,
        "prompt_tokens": PROMPT_TOKENS,
        "answer_tokens": ANSWER_TOKENS,
    }
    write_result(args.json, result, "measured", list(range(1, rounds + 1)))


if __name__ == "__main__":
    main()
