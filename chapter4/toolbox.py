"""The tools that the agent runs: its own ones (`builtin`), and those of MCP servers."""

import argparse
import os
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from chapter4.builtin_tools import document_tools, python_tool
from chapter4.calculator import calculator
from chapter4.date_time import date_time
from chapter4.documents import Documents
from chapter4.http_get import AllowedHost, http_get_tool
from chapter4.mcp_target import McpTarget
from chapter4.tools import Tool, function_tool
from common.errors import ComponentError
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
    parser.add_argument(
        "--documents",
        type=_folder,
        metavar="DIR",
        default=os.environ.get("DOCUMENTS", str(Path(__file__).parent / "documents")),
        help="the folder that search_documents searches (env DOCUMENTS, that of the chapter)",
    )
    parser.add_argument(
        "--allow-host",
        type=_host,
        action="append",
        metavar="HOST[:PORT]",
        default=[],
        help="http_get may ask this host; may repeat (none). One in a private network, or on a "
        "port other than 80 and 443, needs its port",
    )
    parser.add_argument(
        "--mcp",
        type=_mcp_target,
        action="append",
        metavar="LABEL=COMMAND|URL",
        default=[],
        help="an MCP server whose tools requests may use by this label: a command to start, which "
        "speaks over its input and output, or a URL; may repeat (none)",
    )


def _folder(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text}")
    return Path(text)


def _host(text: str) -> AllowedHost:
    try:
        return AllowedHost.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _mcp_target(text: str) -> McpTarget:
    try:
        target = McpTarget.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if target.label == BUILTIN:
        raise argparse.ArgumentTypeError(f"the label {BUILTIN} is that of our own tools")
    return target


@asynccontextmanager
async def open_toolbox(
    args: argparse.Namespace, more: Sequence[Tool] = ()
) -> AsyncIterator[Toolbox]:
    """The tools that `add_tool_arguments` asks for, and `more` of our own.

    MCP servers that were started end with the block.

    Raises:
        ComponentError: an MCP server cannot be started or reached, or has no tools: says why.
    """
    sets = {BUILTIN: [*builtin_tools(args), *more]}
    async with AsyncExitStack() as stack:
        if args.mcp:
            sets |= await stack.enter_async_context(_mcp_sets(args.mcp))
        yield Toolbox(sets)


@asynccontextmanager
async def _mcp_sets(targets: list[McpTarget]) -> AsyncIterator[dict[str, list[Tool]]]:
    from chapter4.mcp_tools import McpServer  # takes a second, which other agents need not wait

    sets: dict[str, list[Tool]] = {}
    async with AsyncExitStack() as stack:
        for target in targets:
            if target.label in sets:
                raise ComponentError(f"two MCP servers have the label {target.label}")
            server = McpServer(target)
            stack.push_async_callback(server.close)
            try:
                sets[target.label] = await server.tools()
            except ConnectionError as error:
                raise ComponentError(str(error)) from error
        yield sets


def builtin_tools(args: argparse.Namespace) -> list[Tool]:
    """Our own tools; `http_get` is one of them where the operator allows a host."""
    return [
        function_tool(calculator),
        function_tool(date_time),
        *document_tools(Documents(args.documents)),
        python_tool(),
        *([http_get_tool(args.allow_host)] if args.allow_host else []),
    ]
