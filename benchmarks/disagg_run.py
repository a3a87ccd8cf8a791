"""One run of one mode: the requests at their times, and what comes of it."""

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.disagg_pipeline import Bench, Mode
from benchmarks.disagg_records import (
    CAUSES,
    EngineRecords,
    Gap,
    cause,
    engine_gaps_ms,
    gaps_of,
    handover,
    slowdown,
    step_cost,
)
from benchmarks.disagg_workload import Arrival, Kind, completion, prompt_of
from benchmarks.report import median, percentile
from benchmarks.sse_load import Answer, ask
from common.text import TextModel

import psutil

WARM_UP = ((160, 4), (24, 24), (160, 4), (24, 24))  # tokens of prompts and outputs
SATURATED = 0.95  # of the time in which requests arrive an engine is at work
GROWS = 1.5  # times as many requests in flight in the second half as in the first
IDLE = 0.3
OTHERS = 0.25  # cores that are busy with something else


@dataclass(frozen=True)
class Asked:
    """A request and its answer; times are those of `time.perf_counter`."""

    arrival: Arrival
    sent: float
    answer: Answer
    events: list[float]

    @property
    def gaps(self) -> list[Gap]:
        return gaps_of(self.answer.request_id, self.events)


@dataclass(frozen=True)
class Run:
    """The figures of one run, what is wrong with it, and where time went."""

    figures: dict[str, float]
    faults: list[str]
    handovers: list[dict[str, float]]
    causes: dict[str, float]
    tokens: list[int]


async def run(bench: Bench, mode: Mode, requests: Sequence[Arrival], text: TextModel) -> Run:
    """Start the mode, warm it up, and send the requests to engines with empty caches."""
    await bench.use(mode)
    await warm_up(bench, text)
    await bench.clear_caches()
    before = await bench.states(lambda states: True)
    cpu_before = _cpu_seconds(bench)
    begin = time.perf_counter()
    asked = await _send_all(bench.port, requests, begin)
    end = time.perf_counter()
    cpu = {name: seconds - cpu_before[name] for name, seconds in _cpu_seconds(bench).items()}
    after = await bench.states(lambda states: not any(state.active for state in states))
    records = bench.records(begin, time.perf_counter())
    failed = sum(s.metrics.failed_transfers for s in after if s.metrics is not None)
    failed -= sum(s.metrics.failed_transfers for s in before if s.metrics is not None)
    faults = [f"{failed} transfers failed"] if failed else []
    faults += [
        f"engine {s.worker_id} is {s.health}: {s.health_reason}"
        for s in after
        if s.health != "healthy"
    ]
    last_arrival = begin + requests[-1].at_s
    figures = _figures(asked, begin, end, last_arrival)
    figures |= _engine_figures(records, begin, last_arrival)
    figures |= {f"cores_{name}": seconds / (end - begin) for name, seconds in cpu.items()}
    figures["cores_others"] = 2 * figures["cores_machine"] - sum(
        cores for name, cores in figures.items() if name.startswith("cores_")
    )
    figures["failed_transfers"] = failed
    remote = {
        request
        for engine in records
        for request, arrived in engine.arrived.items()
        if arrived["prefill_only"]
    }
    faults += [*answer_faults(asked), *prompt_faults(mode, asked, remote)]
    handovers = [
        parts
        for item in asked
        if item.answer.request_id in remote and len(item.events) > 1
        and (parts := handover(item.answer.request_id, records[0], records[1], item.events[1]))
    ]  # fmt: skip
    tokens = [item.answer.tokens for item in asked]
    return Run(figures, faults, handovers, _causes(asked, records, remote), tokens)


async def warm_up(bench: Bench, text: TextModel) -> None:
    rng = random.Random(0)
    bodies = [completion(text, prompt_of(text, rng, n), output) for n, output in WARM_UP]
    await asyncio.gather(*(ask(bench.port, body) for body in bodies))


async def _send_all(port: int, requests: Sequence[Arrival], begin: float) -> list[Asked]:
    async def one(arrival: Arrival) -> Asked:
        await asyncio.sleep(max(begin + arrival.at_s - time.perf_counter(), 0.0))
        events: list[float] = []
        sent = time.perf_counter()
        answer = await ask(port, arrival.body, events)
        return Asked(arrival, sent, answer, events)

    return list(await asyncio.gather(*(one(arrival) for arrival in requests)))


def _figures(
    asked: Sequence[Asked], begin: float, end: float, last_arrival: float
) -> dict[str, float]:
    """What the client sees."""
    outputs = sum(item.answer.tokens for item in asked)
    prompts = sum(item.answer.prompt_tokens for item in asked)
    events = sum(len(item.events) for item in asked)
    found = {
        "throughput_tokens_per_s": outputs / (end - begin),
        "total_tokens_per_s": (outputs + prompts) / (end - begin),
        "tokens_per_event": outputs / events,
        "drain_s": end - last_arrival,
        **_in_flight(asked),
    }
    groups: dict[str, tuple[Kind, ...]] = {
        "": ("long", "chat"), "chat_": ("chat",), "long_": ("long",)
    }  # fmt: skip
    for prefix, kinds in groups.items():
        some = [item for item in asked if item.arrival.kind in kinds]
        ttfts = [item.answer.ttft_s * 1e3 for item in some]
        gaps = [gap.ms for item in some for gap in item.gaps]
        found |= {
            f"{prefix}ttft_p50_ms": median(ttfts),
            f"{prefix}ttft_p95_ms": percentile(ttfts, 0.95),
            f"{prefix}itl_p50_ms": median(gaps),
            f"{prefix}itl_p95_ms": percentile(gaps, 0.95),
            f"{prefix}itl_p99_ms": percentile(gaps, 0.99),
            f"{prefix}itl_max_ms": max(gaps),
        }
    return found


def _in_flight(asked: Sequence[Asked]) -> dict[str, float]:
    """Requests that a new one finds, in the first and the second half: a queue would grow."""
    found = [
        sum(
            other.sent < item.sent < other.sent + other.answer.total_s
            for other in asked
            if other is not item
        )
        for item in asked
    ]
    half = len(found) // 2
    return {
        "in_flight_first_half": sum(found[:half]) / max(half, 1),
        "in_flight_second_half": sum(found[half:]) / (len(found) - half),
    }


def _engine_figures(
    records: Sequence[EngineRecords], begin: float, last_arrival: float
) -> dict[str, float]:
    """What the engines say: time at work while requests arrive, in all, and bytes moved."""
    found = {
        f"busy_engine{worker}": engine.busy_s(begin, last_arrival) / (last_arrival - begin)
        for worker, engine in enumerate(records)
    }
    steps = [step for engine in records for step in engine.steps]
    found["busy_s"] = sum(step["end"] - step["begin"] for step in steps)
    found["engine_itl_p99_ms"] = percentile(
        [gap for engine in records for gap in engine_gaps_ms(engine)], 0.99
    )
    for worker, engine in enumerate(records):
        found[f"slowdown_engine{worker}"] = slowdown(engine, records[1 - worker])
    found |= step_cost(steps)
    for name in ("export_kv_s", "import_kv_s"):
        found[name] = sum(step.get(name, 0.0) for step in steps)
    fetches = [fetch for engine in records for fetch in engine.fetches]
    seconds = sum(fetch["end"] - fetch["begin"] for fetch in fetches)
    moved = sum(fetch["bytes"] for fetch in fetches)
    found |= {"transfers": len(fetches), "moved_bytes": moved}
    found["transfer_gb_per_s"] = moved / seconds / 1e9 if fetches else 0.0
    return found


def answer_faults(asked: Sequence[Asked]) -> list[str]:
    """Answers that have not the length they were to have; no prompt is cached anywhere."""
    faults = []
    for item in asked:
        arrival, answer = item.arrival, item.answer
        expected = (arrival.prompt_tokens, arrival.output_tokens, 0)
        got = (answer.prompt_tokens, answer.tokens, answer.cached_tokens)
        if got != expected:
            faults.append(f"prompt, output and cached tokens are {got}, not {expected}")
    return faults


def prompt_faults(mode: Mode, asked: Sequence[Asked], remote: set[str]) -> list[str]:
    """Prompts that were not computed where they should have been; `remote` are request ids."""
    faults = []
    limit = mode.remote_tokens
    for kind in ("long", "chat"):
        some = [item for item in asked if item.arrival.kind == kind]
        expected = [i for i in some if limit is not None and i.arrival.prompt_tokens >= limit]
        got = [item for item in some if item.answer.request_id in remote]
        if got != expected:
            faults.append(
                f"{len(got)} of {len(some)} prompts of kind {kind} were computed by the other "
                f"engine, not {len(expected)}"
            )
    return faults


def load_faults(figures: dict[str, float]) -> list[str]:
    """Why the load is not one under which modes can be compared."""
    busy = [figures["busy_engine0"], figures["busy_engine1"]]
    faults = []
    first, second = (figures[f"in_flight_{half}_half"] for half in ("first", "second"))
    # One that generates for many at once may well be at work all the time, but has no queue.
    if max(busy) > SATURATED and second > GROWS * first:
        faults.append(
            f"an engine is at work {max(busy):.0%} of the time, and requests in flight grow from "
            f"{first:.1f} to {second:.1f}: too much load"
        )
    if max(busy) < IDLE:
        faults.append(f"no engine is at work more than {max(busy):.0%} of the time: too little")
    if figures["cores_others"] > OTHERS:
        others = figures["cores_others"]
        faults.append(f"{others:.2f} cores are busy with something else: not a quiet machine")
    return faults


def _causes(
    asked: Sequence[Asked], records: Sequence[EngineRecords], remote: set[str]
) -> dict[str, float]:
    """What the longest hundredth of all gaps came from, as shares of it."""
    gaps = [(gap, len(item.events)) for item in asked for gap in item.gaps]
    limit = percentile([gap.ms for gap, _ in gaps], 0.99)
    longest = [(gap, events) for gap, events in gaps if gap.ms >= limit]
    counted = Counter(cause(gap, events, records, remote) for gap, events in longest)
    return {name: round(counted[name] / len(longest), 3) for name in CAUSES}


def _cpu_seconds(bench: Bench) -> dict[str, float]:
    """Of processor time, by process; `machine` is that of all on our cores."""
    found = {}
    for name, child in bench.chapter.processes.items():
        times = psutil.Process(child.pid).cpu_times()
        found[name] = times.user + times.system
    own = psutil.Process().cpu_times()
    found["client"] = own.user + own.system
    known = psutil.cpu_times(percpu=True)
    cores = [known[core] for core in os.sched_getaffinity(0)]
    found["machine"] = sum(sum(core) - core.idle - core.iowait - core.guest for core in cores)
    return found
