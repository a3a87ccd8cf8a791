"""The questions of --ask, one after the other, and their answers on standard output."""

import argparse

from launch.ask import ask
from launch.ask_agent import ask_agent
from launch.chapters import AGENTS, PLAN


async def answer_questions(url: str, arguments: argparse.Namespace) -> None:
    """Ask the pipeline at `url`; raises a `LaunchError` as `ask` does."""
    for question in arguments.ask:
        if len(arguments.ask) > 1:
            print(f"> {question}", flush=True)
        print(f"\n{await _answer(url, question, arguments)}", flush=True)


async def _answer(url: str, question: str, arguments: argparse.Namespace) -> str:
    """Print the answer as it comes; returns what it took."""

    def show(text: str) -> None:
        print(text, end="", flush=True)

    if arguments.chapter not in AGENTS:
        return str(await ask(url, question, show))
    # A simulated engine has no grammar; the small model cannot choose a tool by itself.
    tools, chooses = arguments.backend != "simulated", arguments.model is not None
    return await ask_agent(
        url, question, show, tools=tools, plan=() if chooses or not tools else PLAN
    )
