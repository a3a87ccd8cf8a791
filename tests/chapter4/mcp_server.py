"""An MCP server of the official package: `python mcp_server.py [PORT]`, over stdio or HTTP."""

import sys

from mcp.server.mcpserver import MCPServer

server = MCPServer("tests")


@server.tool()
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@server.tool()
def big(size: int) -> str:
    """Return much."""
    return "x" * size


if __name__ == "__main__":
    if sys.argv[1:]:
        server.run("streamable-http", port=int(sys.argv[1]))
    else:
        server.run("stdio")
