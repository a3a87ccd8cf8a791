"""One run of one policy: the agents' tasks beside the crowd, and what comes of it."""

import asyncio
import random
import time
from dataclasses import dataclass, field

from benchmarks.agent_pipeline import Answer, Bench
from benchmarks.agent_workload import Question, Step, Workload, crowd
from benchmarks.disagg_workload import prompt_of
from benchmarks.report import median, percentile
from common.protocol_routing import RoutingHints
from common.text import TextModel

PROBE_TOKENS = 256
PROBES = 3
UNEQUAL = 1.5  # times as long as another engine takes for the same prompt
WATCH_S = 0.5


@dataclass(frozen=True)
class Contender:
    """A policy, and whether the agents say what they do."""

    policy: str
    hints: bool

    @property
    def name(self) -> str:
        usual = self.hints == (self.policy == "agent")
        return self.policy if usual else f"{self.policy}{'+' if self.hints else '-'}hints"


def contender(name: str) -> Contender:
    """Of `agent` or `POLICY+hints`, which have hints, or `POLICY`, which has none."""
    policy, plus, _ = name.partition("+hints")
    return Contender(policy, bool(plus) or policy == "agent")


@dataclass
class Run:
    """The figures of one run, and what is wrong with it."""

    figures: dict[str, float]
    faults: list[str]


@dataclass
class _Seen:
    answers: list[Answer] = field(default_factory=list)
    tasks_s: list[float] = field(default_factory=list)
    crowd: list[Answer] = field(default_factory=list)
    retained: int = 0


async def probe(bench: Bench, text: TextModel, rng: random.Random) -> list[float]:
    """How long each engine takes for `PROBE_TOKENS` of prompt, all at once, without other work."""
    probes = [await bench.prefill_s(prompt_of(text, rng, PROBE_TOKENS)) for _ in range(PROBES)]
    return [min(times) for times in zip(*probes, strict=True)]


async def run(bench: Bench, who: Contender, load: Workload, text: TextModel) -> Run:
    """Start the router, see that the engines are alike, and let the agents work."""
    await bench.use(who.policy)
    fastest = await probe(bench, text, random.Random(load.crowd_seed + 1))
    seen = _Seen()

    async def ask_once(question: Question) -> None:
        seen.crowd.append(await bench.ask(question.tokens, question.max_tokens, RoutingHints()))

    async def come() -> None:
        for question in crowd(text, load):
            await asyncio.sleep(question.after_s)
            tasks.create_task(ask_once(question))

    async def work(start_s: float, agent: list[list[Step]]) -> None:
        await asyncio.sleep(start_s)
        for task in agent:
            began = time.perf_counter()
            for step in task:
                hints = step.hints if who.hints else RoutingHints()
                seen.answers.append(await bench.ask(step.tokens, step.max_tokens, hints))
                await asyncio.sleep(step.tool_s)
            seen.tasks_s.append(time.perf_counter() - began)

    async def watch() -> None:
        while True:
            for state in await bench.states(lambda states: True):
                if state.metrics is not None:
                    seen.retained = max(seen.retained, state.metrics.retained_blocks)
            await asyncio.sleep(WATCH_S)

    began = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        beside = [tasks.create_task(come()), tasks.create_task(watch())]
        agents = [
            tasks.create_task(work(start, agent))
            for start, agent in zip(load.starts_s, load.agents, strict=True)
        ]
        await asyncio.wait(agents)
        seconds = time.perf_counter() - began
        for task in beside:
            task.cancel()
    states = await bench.states(lambda states: not any(state.active for state in states))
    policy = await bench.policy()
    faults = [
        f"worker {s.worker_id} is {s.health}: {s.health_reason}"
        for s in states
        if s.health != "healthy"
    ]
    faults += [] if all(s.blocks for s in states) else ["no KV event came from an engine"]
    faults += [f"the policy failed: {policy.failure}"] if policy.failures else []
    faults += ["nothing was retained"] if who.hints and not seen.retained else []
    faults += ["something was retained"] if seen.retained and not who.hints else []
    if max(fastest) > UNEQUAL * min(fastest):
        faults.append(f"engines are not alike: {', '.join(f'{s:.2f} s' for s in fastest)}")
    return Run(_figures(seen, seconds), faults)


def _figures(seen: _Seen, seconds: float) -> dict[str, float]:
    ttfts = [answer.ttft_s * 1e3 for answer in seen.answers]
    crowd_ttfts = [answer.ttft_s * 1e3 for answer in seen.crowd]
    prompt = sum(answer.prompt_tokens for answer in seen.answers)
    return {
        "task_p50_s": median(seen.tasks_s),
        "task_p95_s": percentile(seen.tasks_s, 0.95),
        "tasks": float(len(seen.tasks_s)),
        "steps": float(len(seen.answers)),
        "ttft_p50_ms": median(ttfts),
        "ttft_p95_ms": percentile(ttfts, 0.95),
        "cached_share": sum(answer.cached_tokens for answer in seen.answers) / prompt,
        "crowd_ttft_p50_ms": median(crowd_ttfts) if crowd_ttfts else 0.0,
        "crowd_ttft_p95_ms": percentile(crowd_ttfts, 0.95) if crowd_ttfts else 0.0,
        "crowd_per_s": len(seen.crowd) / seconds,
        "retained_blocks": float(seen.retained),
        "seconds": seconds,
    }
