"""What KV-aware routing is worth: two real engines, one policy of the chapter after the other.

    python -m benchmarks.kv_routing --json FILE
    python -m benchmarks.kv_routing --chapter chapter3 --policies kv,dynamo,earliest_start

Each engine has one thread, so that the two do not fight over two cores. Every run begins with
empty caches and sends the same requests, those of the first two workloads at the pace of people,
those of the last one four at a time. A seed runs all policies on all workloads before the next
seed, in an order that changes, because the machine's speed drifts. TTFT is the client's; the
cached share is what the engines say they did not compute; the oracle is one engine with endless
memory.
"""

import asyncio
import os
import random
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from benchmarks.kv_routing_plot import plot
from benchmarks.kv_workloads import FULL, QUICK, Request, Size, Workload, oracle_share, workloads
from benchmarks.report import (
    GuardError,
    argument_parser,
    markdown_table,
    median,
    percentile,
    with_spread,
    write_result,
)
from benchmarks.sse_load import Answer, ask
from common.model_files import DEFAULT_MODEL
from common.protocol import from_wire
from common.protocol_router import WorkerState
from common.text import load_text_model
from launch.chapters import Options
from launch.children import Children
from launch.pipeline import Pipeline, pipeline
from launch.ports import free_port
from launch.servers import etcd_server, nats_server, server_environment

from dynamo.runtime import Client, DistributedRuntime

ENGINES = 2
BLOCK_SIZE = 16
POLICIES = ("random", "round_robin", "least_loaded", "kv")
QUICK_POLICIES = ("random", "least_loaded", "kv")
NAMESPACE = "kv-routing"
READY_S = 10.0
Run = dict[str, float]


async def send_all(port: int, workload: Workload) -> tuple[list[Answer], float]:
    """Every session's requests in order; the answers and the seconds."""
    answers: list[Answer] = []
    slots = asyncio.Semaphore(workload.in_flight)

    async def session(requests: list[Request]) -> None:
        for request in requests:
            await asyncio.sleep(request.think_s)
            async with slots:
                answer = await ask(port, request.body)
            if answer.prompt_tokens != len(request.tokens):
                raise GuardError(
                    f"a prompt of {answer.prompt_tokens} tokens, {len(request.tokens)} expected"
                )
            answers.append(answer)

    started = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for requests in workload.sessions:
            tasks.create_task(session(requests))
    return answers, time.perf_counter() - started


class Bench:
    """A running pipeline, and the endpoints by which its caches are cleared and looked at."""

    def __init__(self, chapter: Pipeline, port: int, clear: Client, state: Client) -> None:
        self.chapter, self.port = chapter, port
        self._clear, self._state = clear, state
        self._command = list(chapter.commands["router"])

    async def use_policy(self, policy: str) -> None:
        """Start the router anew with this policy."""
        if "router" in self.chapter.processes:
            await self.chapter.processes.pop("router").stop()
        self.chapter.commands["router"] = [*self._command, "--policy", policy]
        await self.chapter.start("router").wait_ready()

    async def run(self, workload: Workload) -> Run:
        """One run from empty caches."""
        for instance in self._clear.instance_ids():
            async for _ in await self._clear.direct({}, instance, annotated=False):
                pass
        await self._cached(lambda blocks: max(blocks) == 0)
        answers, seconds = await send_all(self.port, workload)
        if {answer.worker_id for answer in answers} - set(range(ENGINES)):
            raise GuardError("an answer came from an unknown worker")
        await self._cached(lambda blocks: max(blocks) > 0)  # no KV event, no result
        prompt = sum(answer.prompt_tokens for answer in answers)
        by_worker = [
            sum(a.prompt_tokens for a in answers if a.worker_id == worker)
            for worker in range(ENGINES)
        ]
        ttfts = [answer.ttft_s * 1e3 for answer in answers]
        return {
            "ttft_p50_ms": median(ttfts),
            "ttft_p95_ms": percentile(ttfts, 0.95),
            "cached_share": sum(answer.cached_tokens for answer in answers) / prompt,
            "balance": max(by_worker) * ENGINES / prompt,
            "tokens_per_s": (prompt + sum(answer.tokens for answer in answers)) / seconds,
        }

    async def _cached(self, agrees: Any) -> None:
        """Wait until the router has followed the engines' events.

        Raises:
            GuardError: it does not, or there are not as many engines as there should be.
        """
        until = time.monotonic() + READY_S
        states: list[WorkerState] = []
        while time.monotonic() < until:
            try:
                stream = await self._state.round_robin({}, annotated=False)
                states = [from_wire(item, WorkerState) async for item in stream]
            except Exception as error:  # the router before this one may still be listed
                print(f"waiting for the router: {error}", file=sys.stderr)
            ready = [state for state in states if state.state == "ready"]
            if len(ready) == ENGINES and agrees([state.blocks for state in ready]):
                return
            await asyncio.sleep(0.05)
        raise GuardError(f"the router's view is not what it should be: {states}")


async def measure(
    chapter_name: str, seeds: list[int], size: Size, policies: tuple[str, ...]
) -> dict[tuple[str, str], list[Run]]:
    """The runs, one a seed, by workload and policy, and the oracle's among them."""
    text = load_text_model(DEFAULT_MODEL)
    found: dict[tuple[str, str], list[Run]] = {}
    async with AsyncExitStack() as stack:
        children = stack.enter_context(Children())
        nats = await stack.enter_async_context(nats_server(children))
        etcd = await stack.enter_async_context(etcd_server(children))
        environment = server_environment(nats.url, etcd.url)
        os.environ.update(environment)
        port = free_port()
        chapter = await stack.enter_async_context(
            pipeline(
                children,
                environment,
                chapter_name,
                Options(NAMESPACE, engines=ENGINES, backend="llamacpp", port=port),
                arguments={
                    "engine": ["--engine-arg", "batch_threads=1", "--engine-arg", "threads=1"]
                },
            )
        )
        await chapter.wait_ready()
        runtime = DistributedRuntime(asyncio.get_running_loop(), "etcd", "nats")
        stack.callback(runtime.shutdown)
        clear = await runtime.endpoint(f"{NAMESPACE}.engine.clear_kv_blocks").client()
        state = await runtime.endpoint(f"{NAMESPACE}.router.state").client()
        bench = Bench(chapter, port, clear, state)
        for seed in [0, *seeds]:  # seed 0 warms up
            todo = workloads(text, QUICK if seed == 0 else size, seed)
            order = list(policies)
            random.Random(seed).shuffle(order)
            for policy in order[:1] if seed == 0 else order:
                await bench.use_policy(policy)
                for workload in todo:
                    result = await bench.run(workload)
                    if seed == 0:
                        continue
                    found.setdefault((workload.name, policy), []).append(result)
                    print(f"seed {seed}: {workload.name}, {policy}: {_line(result)}",
                          file=sys.stderr)  # fmt: skip
            for workload in todo:
                if seed:
                    share = oracle_share(workload.requests, BLOCK_SIZE)
                    found.setdefault((workload.name, "oracle"), []).append({"cached_share": share})
    return found


def _line(run: Run) -> str:
    return ", ".join(f"{key} {value:.3g}" for key, value in run.items())


def summary(found: dict[tuple[str, str], list[Run]], policies: tuple[str, ...]) -> list[Any]:
    result = []
    for name in dict.fromkeys(workload for workload, _ in found):
        oracle = [run["cached_share"] for run in found[name, "oracle"]]
        rows = []
        for policy in policies:
            runs = found[name, policy]
            rounds = {key: [run[key] for run in runs] for key in runs[0]}
            rows.append(
                {
                    "name": policy,
                    **{key: round(median(values), 4) for key, values in rounds.items()},
                    "oracle_share": round(median(oracle), 4),
                    "of_oracle": round(median([c / o for c, o in zip(rounds["cached_share"], oracle,
                                                                     strict=True)]), 4)
                    if all(oracle) else None,
                    "rounds": rounds,
                }
            )  # fmt: skip
        result.append({"name": name, "policies": rows})
    return result


def table(result: list[Any]) -> str:
    header = ["workload", "policy", "TTFT p50 ms", "TTFT p95 ms", "cached share", "of the oracle's"]
    header += ["busiest worker's load", "tokens/s"]
    lines = []
    for workload in result:
        for row in workload["policies"]:
            rounds = row["rounds"]
            lines.append(
                [
                    workload["name"] if row is workload["policies"][0] else "",
                    row["name"],
                    with_spread(rounds["ttft_p50_ms"]),
                    with_spread(rounds["ttft_p95_ms"]),
                    f"{row['cached_share']:.3f}",
                    "" if row["of_oracle"] is None else f"{row['of_oracle']:.3f}",
                    f"{row['balance']:.2f}",
                    with_spread(rounds["tokens_per_s"]),
                ]
            )
    return markdown_table(header, lines)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the TTFTs here")
    parser.add_argument(
        "--chapter", choices=("chapter2", "chapter3"), default="chapter2", help="(%(default)s)"
    )
    parser.add_argument(
        "--policies",
        type=lambda text: tuple(text.split(",")),
        metavar="NAME,NAME",
        help=f"of the chapter's router ({','.join(POLICIES)}; quick: {','.join(QUICK_POLICIES)})",
    )
    args = parser.parse_args()
    seeds = [1, 2, 3]
    size, policies = (QUICK, QUICK_POLICIES) if args.quick else (FULL, POLICIES)
    policies = args.policies or policies
    result = summary(asyncio.run(measure(args.chapter, seeds, size, policies)), policies)
    print(table(result))
    if args.plot is not None:
        plot(result, args.plot)
    document = {"chapter": args.chapter, "workloads": result}
    write_result(args.json, document, "measured", seeds)


if __name__ == "__main__":
    main()
