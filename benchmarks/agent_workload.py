"""Scripted agents and the crowd beside them, the same for every policy.

An agent has a task of some steps. The prompt of a step is that of the one before, what the agent
said then, and what its tool returned, all made up, so that every policy gets the same tokens;
between two steps the tool runs for a time that is drawn as well. The crowd asks single questions
that nobody repeats: each takes place in the caches and in the queue.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.disagg_workload import prompt_of
from common.kv import block_hashes
from common.protocol_routing import AgentState, RoutingHints
from common.text import TextModel

TOGETHER = 8  # questions


@dataclass(frozen=True)
class Size:
    """Sizes are in tokens, ranges inclusive.

    The prompts of the crowd keep the engines at work for the `crowd_share` of the time. It is
    alone for `alone_s`, so that the caches are full when the agents begin. All agents
    have the system prompt with the tools in common, and begin within `tool_s`.
    """

    agents: int
    tasks: int  # of each agent, one after the other
    steps: tuple[int, int]
    tool_s: tuple[float, float]
    system: int
    task: tuple[int, int]
    said: int
    returned: tuple[int, int]
    answer: int
    crowd_share: float
    crowd_prompt: tuple[int, int]
    crowd_answer: int
    alone_s: float


@dataclass(frozen=True)
class Step:
    """One request of a task; `tool_s` later comes the next one, if there is one."""

    tokens: list[int]
    max_tokens: int
    hints: RoutingHints
    tool_s: float


@dataclass(frozen=True)
class Question:
    """One request of the crowd, `after_s` the one before."""

    after_s: float
    tokens: list[int]
    max_tokens: int


@dataclass(frozen=True)
class Workload:
    """`starts_s` is when each agent begins; an agent is its tasks, a task its steps."""

    size: Size
    crowd_per_s: float
    starts_s: list[float]
    agents: list[list[list[Step]]]
    crowd_seed: int

    @property
    def steps(self) -> list[Step]:
        """In the order in which agents take turns."""
        lines = [[step for task in agent for step in task] for agent in self.agents]
        turns = itertools.zip_longest(*lines)
        return [step for turn in turns for step in turn if step is not None]


def crowd_per_s(size: Size, prefill_tokens_per_s: float) -> float:
    """How often somebody asks who keeps engines that are so fast, all together, as busy as said."""
    return size.crowd_share * prefill_tokens_per_s / (sum(size.crowd_prompt) / 2)


def workload(text: TextModel, size: Size, seed: int, per_s: float) -> Workload:
    rng = random.Random(seed)
    system = prompt_of(text, rng, size.system)
    # The same numbers of steps in all seeds, in any order: no seed is a harder one.
    low, high = size.steps
    tasks = size.agents * size.tasks
    counts = [low + round(n * (high - low) / max(tasks - 1, 1)) for n in range(tasks)]
    rng.shuffle(counts)

    def task(name: str) -> list[Step]:
        steps: list[Step] = []
        tokens = system + prompt_of(text, rng, rng.randint(*size.task))
        count = counts.pop()
        for number in range(1, count + 1):
            last = number == count
            tool_s = rng.uniform(*size.tool_s)
            state: AgentState = "answering" if last else "calling"
            # What an agent expects of a tool is a guess: the middle of what they take.
            expected_s = None if last else sum(size.tool_s) / 2
            length = size.answer if last else size.said
            hints = RoutingHints(
                session=name,
                output_tokens=length,
                agent_state=state,
                next_turn_s=expected_s,
                step=number,
            )
            steps.append(Step(tokens, length, hints, 0.0 if last else tool_s))
            heard = size.said + rng.randint(*size.returned)
            tokens = tokens + prompt_of(text, rng, heard)
        return steps

    agents = [[task(f"{agent}-{n}") for n in range(size.tasks)] for agent in range(size.agents)]
    starts = [size.alone_s + rng.uniform(0.0, size.tool_s[1]) for _ in agents]
    return Workload(size, per_s, starts, agents, rng.getrandbits(32))


def crowd(text: TextModel, load: Workload) -> Iterator[Question]:
    """Arrivals without end: at random, but `TOGETHER` of them always take the same time.

    So the crowd of one seed is no larger than that of another.
    """
    rng, size = random.Random(load.crowd_seed), load.size
    last, window_s = 0.0, TOGETHER / load.crowd_per_s
    for window in itertools.count():
        for share in sorted(rng.random() for _ in range(TOGETHER)):
            prompt = prompt_of(text, rng, rng.randint(*size.crowd_prompt))
            at_s = (window + share) * window_s
            yield Question(at_s - last, prompt, size.crowd_answer)
            last = at_s


def oracle_share(steps: Sequence[Step], block_size: int) -> float:
    """The share of the steps' prompts that any of them had before, as one endless cache would."""
    seen: set[int] = set()
    cached = total = 0
    for step in steps:
        hashes = block_hashes(step.tokens, block_size)
        usable = hashes[: (len(step.tokens) - 1) // block_size]
        cached += block_size * len(list(itertools.takewhile(seen.__contains__, usable)))
        total += len(step.tokens)
        seen.update(hashes)
    return cached / total
