"""The tools that the agent runs: its own ones (`builtin`), and those of MCP servers."""

import argparse
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from chapter4.calculator import calculator
from chapter4.tools import Tool, function_tool
from common.protocol import PipelineError
from common.protocol_agent import ToolSet

BUILTIN = "builtin"


class Toolbox:
    """Sets of tools by name."""

    def __init__(self, sets: dict[str, list[Tool]]) -> None:
        self._sets = sets

    def tools(self, wanted: ToolSet) -> list[Tool]:
        """The tools of a set that the request allows.

        Raises:
            PipelineError: `invalid_request`: there is no such set, or no such tool in it.
        """
        if wanted.server not in self._sets:
            raise _missing("tool set", wanted.server, self._sets)
        tools = {tool.name: tool for tool in self._sets[wanted.server]}
        if wanted.allowed is None:
            return list(tools.values())
        for name in wanted.allowed:
            if name not in tools:
                raise _missing(f"tool of {wanted.server}", name, tools)
        return [tools[name] for name in dict.fromkeys(wanted.allowed)]


def _missing(kind: str, name: str, there_are: Iterable[str]) -> PipelineError:
    names = ", ".join(there_are) or "none"
    return PipelineError(
        "invalid_request", f"There is no {kind} {name!r}; there are: {names}.", "tools"
    )


def add_tool_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the tools may reach."""


@asynccontextmanager
async def open_toolbox(args: argparse.Namespace) -> AsyncIterator[Toolbox]:
    """The tools that `add_tool_arguments` asks for, until the end of the block."""
    yield Toolbox({BUILTIN: [function_tool(calculator)]})
