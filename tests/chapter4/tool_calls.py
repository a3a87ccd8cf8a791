"""Calls of tools, as the agent makes them."""

import json
import time
from collections.abc import Iterable
from typing import Any

from chapter4.run_tool import ToolResult, run_tool
from chapter4.tools import Tool, ToolContext

NOBODY = ToolContext(user="", session="")


async def call(tool: Tool, /, *, within_s: float = 60.0, **arguments: Any) -> ToolResult:
    """One call, with time enough on a busy machine."""
    return await run_tool(tool, json.dumps(arguments), NOBODY, deadline=time.monotonic() + within_s)


def named(tools: Iterable[Tool], name: str) -> Tool:
    return next(tool for tool in tools if tool.name == name)
