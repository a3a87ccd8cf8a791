"""What the engines wrote down, and what a client's long gaps between two tokens come from."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.report import median

import numpy as np

# Of a gap that long tokens of the engine's are behind each other, the rest is the pipeline's.
RELAYED_SHARE = 0.6
COMPARABLE = 5  # steps of a kind
CAUSES = ("handover", "prefill", "import", "decode", "relay")


@dataclass
class EngineRecords:
    """One engine's, of one run; see `disagg_engine`."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    arrived: dict[str, dict[str, Any]] = field(default_factory=dict)
    received: dict[str, dict[str, Any]] = field(default_factory=dict)
    fetches: list[dict[str, Any]] = field(default_factory=list)

    def busy_s(self, begin: float, end: float) -> float:
        """How long steps were computed between two moments."""
        shares = (min(step["end"], end) - max(step["begin"], begin) for step in self.steps)
        return float(sum(max(share, 0.0) for share in shares))

    def token_times(self) -> dict[str, list[dict[str, Any]]]:
        """The steps that had a token of a request, by request."""
        found: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for step in self.steps:
            for request in step["sampled"]:
                found[request].append(step)
        return found


def engine_gaps_ms(engine: EngineRecords) -> list[float]:
    """Between a request's tokens as the engine makes them: the ITL before anything relays it."""
    return [
        (after["end"] - before["end"]) * 1e3
        for steps in engine.token_times().values()
        for before, after in pairwise(steps)
    ]


def step_cost(steps: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What a step takes, in ms: in all cases, for each request that decodes, for each prompt token.

    Least squares over all steps but those that take over KV. Where the first is large beside the
    last, a prompt's tokens are cheaper in large chunks, which is what makes others wait.
    """
    some = [step for step in steps if not step["imports"]]
    known = np.array([[1, step["decodes"], step["prefill"]] for step in some], dtype=float)
    took = np.array([(step["end"] - step["begin"]) * 1e3 for step in some])
    base, decode, prompt = np.linalg.lstsq(known, took, rcond=None)[0]
    return {"step_ms": base, "step_decode_ms": decode, "step_prompt_token_ms": prompt}


def slowdown(engine: EngineRecords, other: EngineRecords) -> float:
    """How much longer a step takes while the other engine is at work; 0 if there are too few.

    Of steps that only decode, like with like: as many requests in both. The cores are two, but
    they share caches and memory, and the rest of the pipeline needs time on them as well.
    """
    alone, beside = defaultdict[int, list[float]](list), defaultdict[int, list[float]](list)
    for step in engine.steps:
        if step["prefill"] or step["imports"]:
            continue
        seconds = step["end"] - step["begin"]
        share = other.busy_s(step["begin"], step["end"]) / seconds
        if not 0.1 < share < 0.9:
            (beside if share > 0.5 else alone)[step["decodes"]].append(seconds)
    total, weight = 0.0, 0
    for batch in alone.keys() & beside.keys():
        count = min(len(alone[batch]), len(beside[batch]))
        if count >= COMPARABLE:
            total += count * median(beside[batch]) / median(alone[batch])
            weight += count
    return total / weight if weight else 0.0


def read_records(path: Path, begin: float, end: float) -> EngineRecords:
    """What an engine wrote down between two moments."""
    found = EngineRecords()
    for line in path.read_bytes().splitlines():
        record = json.loads(line)
        kind = record["kind"]
        if not begin <= record.get("at", record.get("begin", 0.0)) <= end:
            continue
        if kind == "step":
            found.steps.append(record)
        elif kind == "fetched":
            found.fetches.append(record)
        elif kind == "arrived":
            found.arrived[record["id"]] = record
        else:
            found.received[record["id"]] = record
    return found


@dataclass(frozen=True)
class Gap:
    """A wait between two events with text, in a stream; `number` 0 is after the first of them."""

    request: str
    number: int
    begin: float
    end: float

    @property
    def ms(self) -> float:
        return (self.end - self.begin) * 1e3


def gaps_of(request: str, arrivals: Sequence[float]) -> list[Gap]:
    """An event with several tokens ends one gap; its other tokens have none.

    To count them as gaps of 0 would lower the percentiles of whoever sends tokens in bunches.
    """
    return [
        Gap(request, number, begin, end) for number, (begin, end) in enumerate(pairwise(arrivals))
    ]


def cause(gap: Gap, events: int, engines: Sequence[EngineRecords], remote: set[str]) -> str:
    """One of `CAUSES`, by what the engine that generates the answer did meanwhile.

    `events` is how many the whole answer had. `decode`: it computed nothing but the next token
    of every request, but it took so long.
    """
    if gap.number == 0 and gap.request in remote:
        return "handover"
    steps = [
        step
        for engine in engines
        if gap.request in engine.arrived and not engine.arrived[gap.request]["prefill_only"]
        for step in engine.steps
    ]
    own = [step for step in steps if gap.request in step["sampled"]]
    first = events - len(own)  # of the events, those from another engine
    if 0 < gap.number + 1 - first < len(own):
        before, after = own[gap.number - first], own[gap.number + 1 - first]
        if after["end"] - before["end"] < RELAYED_SHARE * gap.ms / 1e3:
            return "relay"
        steps = [s for s in steps if s["begin"] >= before["begin"] and s["end"] <= after["end"]]
        steps = [step for step in steps if step is not before]
    else:
        steps = [s for s in steps if s["end"] > gap.begin and s["begin"] < gap.end]
    if any(step["prefill"] for step in steps):
        return "prefill"
    return "import" if any(step["imports"] for step in steps) else "decode"


PARTS = ("export", "hop", "fetch", "schedule", "step", "back")


def handover(
    request: str, prefill: EngineRecords, decode: EngineRecords, second_token: float
) -> dict[str, float] | None:
    """What the second token waited for after the first was there, in ms; None if it is not known.

    export: the KV is copied out of llama.cpp. hop: the first token goes to the processor, and the
    request to the other engine. fetch: the KV comes from the one to the other. schedule: until
    the first step that takes it over begins. step: from there to the end of the one that computes
    the second token; others have tokens in them as well. back: to the client.
    """
    first = prefill.token_times().get(request)
    steps = decode.token_times().get(request)
    imports = [step for step in decode.steps if request in step["imported"]]
    received, arrived = decode.received.get(request), decode.arrived.get(request)
    if not (first and steps and imports and received and arrived):
        return None
    times = [
        first[0]["sampled_at"],
        first[0]["end"],
        arrived["at"],
        received["at"],
        imports[0]["begin"],
        steps[0]["end"],
        second_token,
    ]
    return {
        part: (end - begin) * 1e3 for part, (begin, end) in zip(PARTS, pairwise(times), strict=True)
    }


def medians(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    """The median of every part on its own."""
    rows = list(parts)
    return {part: round(median([row[part] for row in rows]), 2) for part in PARTS} if rows else {}
