"""The tools of MCP servers, over stdio or HTTP: https://modelcontextprotocol.io.

A server is one that the operator names, never one of a request. What it says is not trusted: its
messages are bounded, its tools' schemas checked, and it gets neither our model nor our environment.
"""

import asyncio
import contextlib
import logging
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from chapter4.mcp_http import http_transport
from chapter4.mcp_target import NAME, McpTarget
from chapter4.tool_arguments import check_schema
from chapter4.tools import Tool, ToolContext, ToolError

import anyio
import mcp
import mcp_types
from anyio.streams.memory import MemoryObjectReceiveStream
from mcp.client._transport import TransportStreams

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 30.0
CALL_TIMEOUT_S = 60.0
MAX_TOOLS = 100
MAX_DESCRIPTION = 2000  # characters


class McpServer:
    """A connection to a server, made again when it is needed and has broken."""

    def __init__(self, target: McpTarget) -> None:
        self._target = target
        self._connection: _Connection | None = None
        self._connecting = asyncio.Lock()

    async def tools(self) -> list[Tool]:
        """The server's tools, which can be called until `close`.

        Raises:
            ConnectionError: it cannot be started or reached, or does not speak MCP: says why.
        """
        connection = await self._connected()
        try:
            with anyio.fail_after(CONNECT_TIMEOUT_S):
                return [self._tool(tool) async for tool in _listed(connection.client, self.label)]
        except (mcp.MCPError, ValueError, TimeoutError) as error:
            raise ConnectionError(f"MCP server {self.label}: no tools: {_reason(error)}") from error

    @property
    def label(self) -> str:
        return self._target.label

    async def close(self) -> None:
        if self._connection is not None:
            await self._connection.close()

    def _tool(self, tool: mcp_types.Tool) -> Tool:
        about = tool.annotations
        # Only then may a call that got no answer be made once more.
        repeatable = about is not None and bool(about.read_only_hint or about.idempotent_hint)

        async def call(arguments: dict[str, Any], context: ToolContext) -> str:
            return await self._call(tool.name, arguments, repeatable)

        description = (tool.description or tool.title or tool.name)[:MAX_DESCRIPTION]
        return Tool(tool.name, description, tool.input_schema, call, CALL_TIMEOUT_S)

    async def _call(self, name: str, arguments: dict[str, Any], repeatable: bool) -> str:
        try:
            connection = await self._connected()
        except ConnectionError as error:
            raise ToolError(str(error), transient=True) from error
        try:
            result = await connection.client.call_tool(name, arguments)
        except mcp.MCPError as error:
            # Over HTTP a restarted server does not know the session: INVALID_REQUEST.
            lost = error.code == mcp_types.CONNECTION_CLOSED or (
                connection.over_http and error.code == mcp_types.INVALID_REQUEST
            )
            connection.broken = connection.broken or lost
            message = f"MCP server {self.label}: {_reason(error)}"
            raise ToolError(message, transient=lost and repeatable) from error
        except (RuntimeError, ValueError, anyio.ClosedResourceError) as error:
            connection.broken = True
            raise ToolError(f"MCP server {self.label}: {_reason(error)}") from error
        text = _text(result)
        if result.is_error:
            raise ToolError(text or "it failed and does not say why")
        return text

    async def _connected(self) -> "_Connection":
        async with self._connecting:
            if self._connection is not None and self._connection.lost():
                logger.warning("MCP server %s is gone; connecting again", self.label)
                await self._connection.close()
                self._connection = None
            if self._connection is None:
                connection = _Connection(self._target)
                await connection.open()
                self._connection = connection
            return self._connection


class _Connection:
    """A client in a task of its own, as what enters it must leave it."""

    client: mcp.Client

    def __init__(self, target: McpTarget) -> None:
        self._target = target
        self.over_http = target.url is not None
        self.broken = False
        self._open = False
        self._incoming: object = None
        self._enough = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Raises ConnectionError, saying why."""
        opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        task = self._task = asyncio.create_task(self._hold(opened), name="mcp")
        try:
            await asyncio.wait({opened, task}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not self._open:
                await self.close()
        if not self._open:
            error = None if task.cancelled() else task.exception()
            reason = "it was cancelled" if error is None else _reason(error)
            raise ConnectionError(f"MCP server {self._target.label}: {reason}") from error

    def lost(self) -> bool:
        """Whether nothing can come from the server any more."""
        ended = self._task is None or self._task.done()
        stream = self._incoming
        closed = (
            isinstance(stream, MemoryObjectReceiveStream)
            and stream.statistics().open_send_streams == 0
        )
        return self.broken or ended or closed

    async def close(self) -> None:
        """End the connection, and with it the server's process."""
        self._enough.set()
        if self._task is None:
            return
        if not self._open:
            self._task.cancel()
        await asyncio.wait({self._task})
        if not self._task.cancelled() and (error := self._task.exception()) is not None:
            logger.info("MCP server %s: %s", self._target.label, _reason(error))

    async def _hold(self, opened: asyncio.Future[None]) -> None:
        client = mcp.Client(self._transport())
        with anyio.fail_after(CONNECT_TIMEOUT_S) as limit:
            async with client:
                limit.deadline = float("inf")
                # It would check results by schemas of the server, which may take hours.
                client.session.validate_tool_result = _not_checked  # type: ignore[method-assign]
                self.client = client
                self._open = True
                opened.set_result(None)
                await self._enough.wait()

    @contextlib.asynccontextmanager
    async def _transport(self) -> AsyncIterator[TransportStreams]:
        """The messages in and out; they also tell whether the other side is still there."""
        if self._target.url is not None:
            transport = http_transport(self._target.url)
        else:
            log = sys.__stderr__ or sys.stderr
            transport = mcp.stdio_client(_relayed(self._target.command), log)
        async with transport as streams:
            self._incoming = streams[0]
            yield streams


def _relayed(command: Sequence[str]) -> mcp.StdioServerParameters:
    """The command behind `mcp_relay.py`; its environment is HOME, PATH and the like alone."""
    relay = Path(__file__).with_name("mcp_relay.py")
    arguments = ["-I", "-S", str(relay), *command]
    # By default the package would stop reading at a byte that is no text.
    return mcp.StdioServerParameters(
        command=sys.executable, args=arguments, encoding_error_handler="replace"
    )


async def _listed(client: mcp.Client, label: str) -> AsyncIterator[mcp_types.Tool]:
    """The tools whose names and schemas can be used; the others are named in the log."""
    names: set[str] = set()
    cursor, left = None, MAX_TOOLS
    while True:
        page = await client.list_tools(cursor=cursor)
        left -= len(page.tools)
        if left < 0:
            raise ValueError(f"it has more than {MAX_TOOLS}")
        for tool in page.tools:
            try:
                if not NAME.fullmatch(tool.name) or tool.name in names:
                    raise ValueError("its name is taken, or not of A-Z, a-z, 0-9, _ and -")
                check_schema(tool.input_schema)
            except ValueError as error:
                logger.warning("%s: %.64r is left out: %s", label, tool.name, error)
                continue
            names.add(tool.name)
            yield tool
        cursor = page.next_cursor
        if not cursor:
            return
        if not page.tools:
            raise ValueError("it has pages without any")


async def _not_checked(name: str, result: mcp_types.CallToolResult) -> None:
    pass


def _text(result: mcp_types.CallToolResult) -> str:
    parts = [
        part.text if isinstance(part, mcp_types.TextContent) else f"[{part.type} is not shown]"
        for part in result.content
    ]
    if not parts and result.structured_content is not None:
        return str(result.structured_content)
    return "\n".join(parts)


def _reason(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, TimeoutError):
        return f"no answer within {CONNECT_TIMEOUT_S:g} s"
    return str(error) or type(error).__name__
