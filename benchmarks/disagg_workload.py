"""Long prompts that arrive while short chats are answered: the same requests for every mode."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.text import TextModel

WORDS = Path(random.__file__).read_text().split()
Kind = Literal["long", "chat"]


@dataclass(frozen=True)
class Shape:
    """One kind of request: lengths in tokens, from and to, and how many come in a second."""

    prompt: tuple[int, int]
    output: tuple[int, int]
    per_s: float


@dataclass(frozen=True)
class Arrival:
    """A request that is sent `at_s` seconds after the beginning."""

    at_s: float
    kind: Kind
    body: dict[str, Any]
    prompt_tokens: int
    output_tokens: int


def arrivals(
    text: TextModel, seed: int, seconds: float, shapes: dict[Kind, Shape], load: float = 1.0
) -> list[Arrival]:
    """The requests of one run in order; `load` multiplies how many there are.

    Poisson arrivals, given their number: any moment is as likely as any other. So all seeds have
    the same load. No two prompts begin alike, and no answer ends before its length.
    """
    rng = random.Random(seed)
    found: list[Arrival] = []
    for kind, shape in shapes.items():
        count = max(round(shape.per_s * seconds * load), 1)
        for share in _spread(rng, count):
            length = shape.prompt[0] + share * (shape.prompt[1] - shape.prompt[0])
            output = rng.randint(*shape.output)
            prompt = prompt_of(text, rng, round(length))
            at_s = rng.uniform(0, seconds)
            found.append(Arrival(at_s, kind, completion(text, prompt, output), len(prompt), output))
    return sorted(found, key=lambda arrival: arrival.at_s)


def _spread(rng: random.Random, count: int) -> list[float]:
    """Shares from 0 to 1, evenly spread and in any order: all seeds have as much to compute."""
    return rng.sample([(number + 0.5) / count for number in range(count)], count)


def prompt_of(text: TextModel, rng: random.Random, tokens: int) -> list[int]:
    """A prompt of exactly so many tokens, of random words."""
    found: list[int] = []
    while len(found) < tokens:
        found += text.encode(" ".join(rng.choices(WORDS, k=tokens)))
    return found[:tokens]


def completion(text: TextModel, prompt: list[int], output_tokens: int) -> dict[str, Any]:
    """The body of a request for exactly so many tokens."""
    return {
        "model": text.name,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "nvext": {"extra_fields": ["worker_id"]},
    }
