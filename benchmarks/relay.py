"""How fast the pipeline relays tokens, beside Dynamo's own frontend before the same engine.

The engine is simulated and takes no time, so what is measured is everything but inference:
HTTP, JSON, tokenisation, the runtime's hops. Both pipelines run at the same time on the same
cores and are measured in turn: ours is frontend, processor and engine, the peer's is Dynamo's
frontend (Rust) and the same engine. Our engine component gathers the items of a stream that is
faster than anyone reads; the peer is measured without that, as Dynamo's workers are, and with it.
Every answer has 128 tokens.
"""

import asyncio
import random
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from benchmarks.peer import PeerUnavailableError, install_peer, peer_pipeline
from benchmarks.report import (
    GuardError,
    argument_parser,
    markdown_table,
    median,
    with_spread,
    write_result,
)
from benchmarks.sse_load import Load, run_load
from benchmarks.toy_model import toy_model
from launch.chapters import Options
from launch.children import Children
from launch.pipeline import pipeline
from launch.ports import free_port
from launch.servers import etcd_server, nats_server, server_environment

CACHE = Path(".cache")
ANSWER_TOKENS = 128
TOKENS_PER_ITEM = (1, 8)
PEERS = ("peer", "peer_batched")
WHO = ("ours", *PEERS)
NAMES = {"ours": "ours", "peer": "peer", "peer_batched": "peer, with our gathering"}
REQUESTS = {1: 24, 32: 256, 256: 768}  # by the number of streams
WORDS = Path(random.__file__).read_text().split()


def bodies(model: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Chat requests with prompts of 40 words, none like another."""
    words = random.Random(seed)
    return [
        {
            "model": model,
            "messages": [{"role": "user", "content": " ".join(words.choices(WORDS, k=40))}],
            "max_tokens": ANSWER_TOKENS,
            "ignore_eos": True,
        }
        for _ in range(count)
    ]


def check(load: Load, requests: int) -> None:
    tokens = {answer.tokens for answer in load.answers}
    if len(load.answers) != requests or tokens != {ANSWER_TOKENS}:
        raise GuardError(f"{len(load.answers)} of {requests} answers, of {tokens} tokens each")


async def measure(
    peer: Path | None, rounds: int, requests: dict[int, int]
) -> tuple[list[dict[str, Any]], str | None]:
    """The rows, and why the peer is not in them, if it is not."""
    left_out: str | None = None
    model = toy_model(CACHE / "toy")
    targets: dict[tuple[str, int], tuple[str, int]] = {}  # (who, tokens an item): model, port
    async with AsyncExitStack() as stack:
        children = stack.enter_context(Children())
        nats = await stack.enter_async_context(nats_server(children))
        etcd = await stack.enter_async_context(etcd_server(children))
        environment = server_environment(nats.url, etcd.url)
        for per_item in TOKENS_PER_ITEM:
            engine_args = ["zero_delay=true", f"tokens_per_item={per_item}"]
            port = free_port()
            ours = await stack.enter_async_context(
                pipeline(
                    children,
                    environment,
                    "chapter1",
                    Options(
                        namespace=f"ours{per_item}",
                        backend="simulated",
                        model=str(model),
                        port=port,
                    ),
                    arguments={
                        "engine": [f for a in engine_args for f in ("--engine-arg", a)],
                    },
                )
            )
            await ours.wait_ready()
            targets["ours", per_item] = (model.name, port)
            for who in PEERS:
                if peer is None or left_out is not None:
                    continue
                port = free_port()
                try:
                    await stack.enter_async_context(
                        peer_pipeline(
                            children,
                            environment,
                            installed=peer,
                            model=model,
                            namespace=f"{who}{per_item}",
                            port=port,
                            engine_args=engine_args,
                            batch_items=who == "peer_batched",
                        )
                    )
                except PeerUnavailableError as error:
                    left_out = str(error)
                else:
                    targets[who, per_item] = ("toy", port)
        loads: dict[tuple[int, str, int], list[Load]] = {}
        for round_number in range(rounds + 1):
            for streams, count in requests.items():
                turns = list(targets.items())
                for (who, per_item), (name, port) in turns[:: -1 if round_number % 2 else 1]:
                    seed = 1000 * round_number + streams
                    load = await run_load(port, bodies(name, count, seed), streams)
                    check(load, count)
                    if round_number > 0:  # the first round warms up
                        loads.setdefault((streams, who, per_item), []).append(load)
                        print(
                            f"round {round_number}: {streams} streams, {per_item} tokens an item, "
                            f"{who}: {load.tokens_per_s:,.0f} tokens/s, "
                            f"TTFT {median(load.ttfts_ms):.1f} ms",
                            file=sys.stderr,
                        )
    rows = [
        row(streams, per_item, {who: loads[streams, who, per_item] for who in WHO
                                if (streams, who, per_item) in loads})
        for per_item in TOKENS_PER_ITEM
        for streams in requests
    ]  # fmt: skip
    return rows, left_out


def row(streams: int, per_item: int, loads: dict[str, list[Load]]) -> dict[str, Any]:
    result: dict[str, Any] = {
        "name": f"{streams} streams, {per_item} tokens an item",
        "streams": streams,
        "tokens_per_item": per_item,
        "rounds": {},
    }
    for who, runs in loads.items():
        tokens_per_s = [round(load.tokens_per_s, 1) for load in runs]
        ttft_p50_ms = [round(median(load.ttfts_ms), 2) for load in runs]
        answers = [answer for load in runs for answer in load.answers]
        result |= {
            f"{who}_tokens_per_s": median(tokens_per_s),
            f"{who}_ttft_p50_ms": median(ttft_p50_ms),
            f"{who}_events_per_answer": sum(a.events for a in answers) / len(answers),
        }
        result["rounds"] |= {
            f"{who}_tokens_per_s": tokens_per_s,
            f"{who}_ttft_p50_ms": ttft_p50_ms,
        }
    if "peer" in loads:
        for key in ("tokens_per_s", "ttft_p50_ms"):
            ratio = round(result[f"ours_{key}"] / result[f"peer_{key}"], 3)
            result["ratio" if key == "tokens_per_s" else "ttft_ratio"] = ratio
    return result


def table(rows: list[dict[str, Any]]) -> str:
    header = ["streams", "tokens an item", "", "tokens/s", "TTFT p50 ms", "events an answer"]
    lines = []
    for entry in rows:
        for who in WHO:
            if f"{who}_tokens_per_s" not in entry:
                continue
            first = who == "ours"
            lines.append(
                [
                    str(entry["streams"]) if first else "",
                    str(entry["tokens_per_item"]) if first else "",
                    NAMES[who],
                    with_spread(entry["rounds"][f"{who}_tokens_per_s"]),
                    with_spread(entry["rounds"][f"{who}_ttft_p50_ms"], 1),
                    f"{entry[f'{who}_events_per_answer']:.1f}",
                ]
            )
        if "ratio" in entry:
            ratios = f"**{entry['ratio']:.2f}**", f"**{entry['ttft_ratio']:.2f}**"
            lines.append(["", "", "ours / peer", *ratios, ""])
    return markdown_table(header, lines)


def main() -> None:
    args = argument_parser(__doc__).parse_args()
    rounds = 3 if args.quick else 5
    requests = {s: n // 4 if args.quick else n for s, n in REQUESTS.items()}
    peer, left_out = None, None
    try:
        peer = install_peer(CACHE)
    except PeerUnavailableError as error:
        left_out = str(error)
    rows, not_run = asyncio.run(measure(peer, rounds, requests))
    left_out = left_out or not_run
    print(table(rows))
    if left_out:
        print(f"\nThe peer is left out: {left_out}")
    result = {"rows": rows, "peer_left_out": left_out, "answer_tokens": ANSWER_TOKENS}
    write_result(args.json, result, "measured", list(range(1, rounds + 1)))


if __name__ == "__main__":
    main()
