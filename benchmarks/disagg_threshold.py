"""From which length on a prompt is better computed by another engine.

    python -m benchmarks.disagg_threshold --json FILE

Prompts of several lengths go through a pipeline of one engine for prefill and one that decodes
(real ones, as in `benchmarks.disagg`), once with every prompt computed by the first and once with
every prompt computed where it is answered; with nothing else to do, and while four chats are
answered. That shows what the router's `--remote-prefill-tokens` has to weigh up: a remote prompt
waits for a hop and for its KV, which shows in its own second token, and a local one makes the
chats wait. `chats lose` is by how much an answer of theirs falls behind meanwhile, and `longest
gap` the longest one between two of its tokens. A remote prefill pays from where on all five
together wait less: the time to the prompt's second token, and what the four chats lose.
"""

import asyncio
import random
import sys
import time
from dataclasses import dataclass
from typing import Any

from benchmarks.disagg_engines import REAL
from benchmarks.disagg_pipeline import Bench, Mode, bench
from benchmarks.disagg_run import warm_up
from benchmarks.disagg_workload import completion, prompt_of
from benchmarks.report import (
    GuardError,
    argument_parser,
    markdown_table,
    median,
    with_spread,
    write_result,
)
from benchmarks.sse_load import ask
from chapter3.disaggregation import DEFAULT_MIN_TOKENS
from common.arguments import positive_int
from common.engines.llamacpp_settings import LlamaCppSettings
from common.model_files import DEFAULT_MODEL
from common.text import TextModel, load_text_model

LENGTHS = (16, 32, 64, 128, 256, 512, 1024)
QUICK_LENGTHS = (16, 64, 256)
OUTPUT_TOKENS = 4
CHATS = 4
CHAT_PROMPT, CHAT_OUTPUT = 24, 1500  # more than is waited for
SETTLE = 16  # events of every chat, by which their usual gap is known
POLL_S = 0.005
NEVER = 1_000_000
WAYS = ("local", "remote")
Figures = dict[str, float]
Found = dict[tuple[int, str, bool], list[Figures]]  # by length, way and whether chats go on


@dataclass(frozen=True)
class Chat:
    """An answer that goes on; `events` are the times of its tokens so far."""

    events: list[float]
    task: "asyncio.Task[Any]"


async def chat(running: Bench, text: TextModel, rng: random.Random) -> Chat:
    body = completion(text, prompt_of(text, rng, CHAT_PROMPT), CHAT_OUTPUT)
    events: list[float] = []
    return Chat(events, asyncio.create_task(ask(running.port, body, events)))


async def settle(chats: list[Chat]) -> None:
    """Wait until every chat has gone on for a while."""
    before = [len(chat.events) for chat in chats]
    while any(len(c.events) < n + SETTLE for c, n in zip(chats, before, strict=True)):
        for one in chats:
            if one.task.done():
                raise GuardError(f"a chat has ended: {one.task.result()}")
        await asyncio.sleep(POLL_S)


async def probe(running: Bench, body: dict[str, Any], chats: list[Chat]) -> Figures:
    """Ask once, and see what becomes of the chats meanwhile."""
    await settle(chats)
    begin = time.perf_counter()
    events: list[float] = []
    answer = await ask(running.port, body, events)
    end = time.perf_counter()
    if answer.cached_tokens or answer.tokens != OUTPUT_TOKENS:
        raise GuardError(f"{answer.tokens} tokens, {answer.cached_tokens} cached: {answer}")
    if len(events) < 2:
        raise GuardError("the second token came with the first")
    found = {
        "ttft_ms": answer.ttft_s * 1e3,
        "second_token_ms": (events[1] - events[0]) * 1e3,
    }
    if chats:
        await settle(chats)
        usual = median([b - a for c in chats for a, b in _gaps(c, 0.0, begin)[-SETTLE:]])
        during = [[b - a for a, b in _gaps(chat, begin, end)] for chat in chats]
        found["chat_gap_ms"] = usual * 1e3
        found["longest_gap_ms"] = max(max(gaps) for gaps in during) * 1e3
        lost = [sum(gaps) - len(gaps) * usual for gaps in during]
        found["chats_lose_ms"] = max(sum(lost) / len(chats), 0.0) * 1e3
    return found


def _gaps(chat: Chat, begin: float, end: float) -> list[tuple[float, float]]:
    """Those that are not over before `begin`, nor begin after `end`."""
    pairs = zip(chat.events, chat.events[1:], strict=False)
    return [(a, b) for a, b in pairs if b > begin and a < end]


async def one_round(
    running: Bench, way: str, chunk: int, lengths: tuple[int, ...], seed: int, text: TextModel
) -> Found:
    """Every length once, quiet and with chats, on new engines."""
    await running.use(Mode(way, chunk, remote_tokens=0 if way == "remote" else NEVER))
    await warm_up(running, text)
    await running.clear_caches()
    rng = random.Random(seed)
    began = time.perf_counter()
    found: Found = {}
    for busy in (False, True):
        chats = [await chat(running, text, rng) for _ in range(CHATS if busy else 0)]
        try:
            for length in rng.sample(lengths, len(lengths)):
                body = completion(text, prompt_of(text, rng, length), OUTPUT_TOKENS)
                found[length, way, busy] = [await probe(running, body, chats)]
        finally:
            for one in chats:
                one.task.cancel()
            await asyncio.gather(*(one.task for one in chats), return_exceptions=True)
    prefill, _ = running.records(began, time.perf_counter())
    expected = (len(lengths) * 2 + CHATS) if way == "remote" else 0
    if len(prefill.arrived) != expected:
        raise GuardError(f"{len(prefill.arrived)} remote prompts, not {expected}")
    states = await running.states(lambda states: True)
    if any(state.metrics and state.metrics.failed_transfers for state in states):
        raise GuardError("transfers failed")
    return found


async def measure(seeds: list[int], chunk: int, lengths: tuple[int, ...]) -> Found:
    text = load_text_model(DEFAULT_MODEL)
    found: Found = {}
    async with bench(REAL) as running:
        for seed in seeds:
            for way in random.Random(seed).sample(WAYS, len(WAYS)):
                part = await one_round(running, way, chunk, lengths, seed, text)
                for key, figures in part.items():
                    found.setdefault(key, []).extend(figures)
                print(f"seed {seed}: {way}", file=sys.stderr)
    return found


def summary(found: Found) -> list[dict[str, Any]]:
    """A row for each length, way and load: medians over the seeds, and the rounds."""
    rows = []
    for (length, way, busy), runs in sorted(found.items()):
        rounds = {name: [run[name] for run in runs] for name in runs[0]}
        figures = {name: round(median(values), 2) for name, values in rounds.items()}
        rows.append(
            {"prompt_tokens": length, "way": way, "chats": CHATS if busy else 0, **figures,
             "waiting_ms": round(waiting(figures), 2), "rounds": rounds}
        )  # fmt: skip
    return rows


def waiting(figures: Figures) -> float:
    """What all of them wait, in ms: the prompt for its second token, and the chats."""
    own = figures["ttft_ms"] + figures["second_token_ms"]
    return own + CHATS * figures.get("chats_lose_ms", 0.0)


def pays_from(rows: list[dict[str, Any]], chats: int) -> int | None:
    """The length from which on all that were measured wait less with a remote prefill."""
    some = {(r["prompt_tokens"], r["way"]): r["waiting_ms"] for r in rows if r["chats"] == chats}
    lengths = sorted({length for length, _ in some})
    found = None
    for length in reversed(lengths):
        if some[length, "remote"] >= some[length, "local"]:
            break
        found = length
    return found


def table(rows: list[dict[str, Any]]) -> str:
    header = ["tokens", "prompt computed", "TTFT ms", "second token ms"]
    header += ["with 4 chats: TTFT ms", "second token ms", "longest gap ms", "chats lose ms"]
    known = {(row["prompt_tokens"], row["way"], row["chats"]): row["rounds"] for row in rows}
    lines = []
    for length in sorted({row["prompt_tokens"] for row in rows}):
        for way in WAYS:
            quiet, busy = known[length, way, 0], known[length, way, CHATS]
            own = [with_spread(r[k]) for r in (quiet, busy) for k in ("ttft_ms", "second_token_ms")]
            chats = [with_spread(busy[key]) for key in ("longest_gap_ms", "chats_lose_ms")]
            lines.append([str(length), way, *own, *chats])
    return markdown_table(header, lines)


def main() -> None:
    parser = argument_parser(__doc__)
    default = LlamaCppSettings.prefill_chunk
    parser.add_argument("--chunk", type=positive_int, default=default, metavar="TOKENS",
                        help="prefill chunk of the engine that decodes (%(default)s)")  # fmt: skip
    args = parser.parse_args()
    seeds, lengths = ([1], QUICK_LENGTHS) if args.quick else ([1, 2, 3], LENGTHS)
    rows = summary(asyncio.run(measure(seeds, args.chunk, lengths)))
    print(table(rows))
    pays = {f"{chats} chats": pays_from(rows, chats) for chats in (0, CHATS)}
    print(f"\nA remote prefill pays from so many tokens on: {pays}; default {DEFAULT_MIN_TOKENS}")
    document = {
        "rows": rows,
        "pays_from_tokens": pays,
        "default_tokens": DEFAULT_MIN_TOKENS,
        "prefill_chunk": args.chunk,
        "prefill_engine_chunk": REAL.prefill_chunk,
    }
    write_result(args.json, document, "measured", seeds)


if __name__ == "__main__":
    main()
