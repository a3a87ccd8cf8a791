"""Workloads for routing, the same for every policy, and what a perfect router makes of them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.kv import block_hashes
from common.protocol import ChatMessage
from common.text import TextModel

WORDS = Path(random.__file__).read_text().split()
ANSWER_TOKENS = 16
IN_FLIGHT = 4  # where the engines are to be busy all the time


@dataclass(frozen=True)
class Size:
    """Numbers of requests, and of words in a prompt (a word is 2 to 3 tokens).

    Nobody waits for the engines only: a chat's user reads and types for up to `think_s`, and
    who shares a system prompt comes at some time of the first `arrivals_s`.
    """

    chats: int
    turns: int
    think_s: float
    system_prompts: int
    shared: int
    arrivals_s: float
    unique: int
    turn_words: int = 16
    system_words: int = 160
    question_words: int = 12
    unique_words: int = 80


FULL = Size(8, 4, 10.0, system_prompts=8, shared=24, arrivals_s=20.0, unique=16)
QUICK = Size(3, 2, 0.5, system_prompts=2, shared=6, arrivals_s=1.0, unique=2, system_words=70)


@dataclass(frozen=True)
class Request:
    """`think_s` is the pause before it, after the session's answer before."""

    body: dict[str, Any]
    tokens: list[int]
    think_s: float = 0.0


@dataclass(frozen=True)
class Workload:
    """Sessions, whose requests follow one another; at most `in_flight` at a time."""

    name: str
    sessions: list[list[Request]]
    in_flight: int

    @property
    def requests(self) -> list[Request]:
        """In the order in which sessions take turns."""
        longest = max(len(session) for session in self.sessions)
        return [s[turn] for turn in range(longest) for s in self.sessions if turn < len(s)]


def workloads(text: TextModel, size: Size, seed: int) -> list[Workload]:
    rng = random.Random(seed)

    def words(count: int) -> str:
        return " ".join(rng.choices(WORDS, k=count))

    def chat(messages: list[ChatMessage], think_s: float) -> Request:
        body = {
            "messages": [{"role": m.role, "content": m.content} for m in messages],
            "max_tokens": ANSWER_TOKENS,
        }
        return Request(_complete(body, text), text.encode(text.render_chat(messages)), think_s)

    def conversation() -> list[Request]:
        # About a document. Answers in the history are made up: every policy gets the same prompts.
        messages = [ChatMessage("system", words(size.system_words))]
        turns = []
        for _ in range(size.turns):
            messages.append(ChatMessage("user", words(size.turn_words)))
            turns.append(chat(messages, rng.uniform(0, size.think_s)))
            messages.append(ChatMessage("assistant", words(ANSWER_TOKENS // 2)))
        return turns

    def unique() -> Request:
        tokens = text.encode(words(size.unique_words))
        return Request(_complete({"prompt": tokens, "max_tokens": ANSWER_TOKENS}, text), tokens)

    systems = [ChatMessage("system", words(size.system_words)) for _ in range(size.system_prompts)]

    def question(number: int) -> Request:
        asked = ChatMessage("user", words(size.question_words))
        return chat([systems[number % len(systems)], asked], rng.uniform(0, size.arrivals_s))

    return [
        Workload("multi-turn chats", [conversation() for _ in range(size.chats)], size.chats),
        Workload("shared system prompts", [[question(n)] for n in range(size.shared)], size.shared),
        Workload("no reuse", [[unique()] for _ in range(size.unique)], IN_FLIGHT),
    ]


def oracle_share(requests: Sequence[Request], block_size: int) -> float:
    """The share of prompt tokens that one engine with endless memory would have cached.

    Full blocks only, and never a whole prompt: its last token must be computed to go on.
    """
    seen: set[int] = set()
    cached = total = 0
    for request in requests:
        hashes = block_hashes(request.tokens, block_size)
        usable = (len(request.tokens) - 1) // block_size
        found = 0
        while found < usable and hashes[found] in seen:
            found += 1
        cached += found * block_size
        total += len(request.tokens)
        seen.update(hashes)
    return cached / total


def _complete(body: dict[str, Any], text: TextModel) -> dict[str, Any]:
    return {
        **body,
        "model": text.name,
        "temperature": 0,
        "ignore_eos": True,
        "nvext": {"extra_fields": ["worker_id"]},
    }
