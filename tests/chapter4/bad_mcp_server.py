"""An MCP server that does what none should: `python bad_mcp_server.py [FOLDER [FAULT]]`.

It speaks as much of the protocol as is needed, without a library that would prevent the worst.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
FAULT = sys.argv[2] if len(sys.argv) > 2 else ""
OBJECT = {"type": "object"}


def text(content: str) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": content}]}


def die() -> dict[str, Any]:
    """End once; a file says that it has."""
    if (FOLDER / "died").exists():
        return text("alive")
    (FOLDER / "died").touch()
    os._exit(1)


def hang() -> dict[str, Any]:
    (FOLDER / "hanging").touch()
    while True:
        time.sleep(1000)


def flood() -> dict[str, Any]:
    while True:
        os.write(1, b"x" * 65536)


def rubbish() -> dict[str, Any]:
    os.write(
        1, b'no JSON\n{"jsonrpc": "2.0"}\n[]\n{"jsonrpc": "2.0", "id": 999, "result": {}}\n\xff\n'
    )
    os.write(2, b"e" * 1_000_000)
    return text("still here")


def child() -> dict[str, Any]:
    """A process that would outlive this one."""
    sleeper = subprocess.Popen(["sleep", "1000"], stdin=subprocess.DEVNULL)
    return text(str(sleeper.pid))


CALLS: dict[str, Callable[[], dict[str, Any]]] = {
    "die": die,
    "die_reading": die,
    "hang": hang,
    "flood": flood,
    "rubbish": rubbish,
    "child": child,
    "pid": lambda: text(str(os.getpid())),
    "fail": lambda: {**text("no such city"), "isError": True},
    "parts": lambda: {
        "content": [
            {"type": "text", "text": "one"},
            {"type": "image", "data": "eA==", "mimeType": "image/png"},
            {"type": "text", "text": "two"},
        ]
    },
    "wrong": lambda: {"content": "no list"},
    "environment": lambda: text(" ".join(sorted(os.environ))),
    "big": lambda: text("x" * 5_000_000),
    "structured": lambda: {**text("still here"), "structuredContent": {"a": "a" * 1000 + "!"}},
}


def tools() -> list[dict[str, Any]]:
    good: list[dict[str, Any]] = [
        {"name": name, "description": f"To {name}.", "inputSchema": OBJECT} for name in CALLS
    ]
    good[1]["annotations"] = {"readOnlyHint": True}
    # To check what is returned by it takes a regular expression for ever.
    evil = {"type": "string", "pattern": "^(a+)+$"}
    good[-1]["outputSchema"] = {"type": "object", "properties": {"a": evil}}
    return [
        *good,
        {"name": "no good name", "inputSchema": OBJECT},
        {"name": "pid", "inputSchema": OBJECT},
        {"name": "far", "inputSchema": {"type": "object", "$ref": "http://x.example/schema"}},
        {"name": "huge", "inputSchema": {"type": "object", "description": "x" * 100_000}},
    ]


def page(cursor: str | None) -> dict[str, Any]:
    if FAULT == "endless":
        return {"tools": [], "nextCursor": "more"}
    if FAULT == "many":  # on one page
        return {"tools": many(0, 101)}
    if FAULT == "many_pages":
        return {"tools": many(60, 120)} if cursor else {"tools": many(0, 60), "nextCursor": "60"}
    return {"tools": tools()}


def many(first: int, end: int) -> list[dict[str, Any]]:
    return [{"name": f"t{number}", "inputSchema": OBJECT} for number in range(first, end)]


def answer(request: dict[str, Any]) -> dict[str, Any]:
    method = request["method"]
    if method == "initialize":
        return {
            "protocolVersion": request["params"]["protocolVersion"],
            "capabilities": {"tools": {}},
            "serverInfo": {"name": "bad", "version": "1"},
        }
    if method == "tools/list":
        return page((request.get("params") or {}).get("cursor"))
    return CALLS[request["params"]["name"]]()


def main() -> None:
    if FAULT == "silent":
        time.sleep(1000)
    if FAULT == "ends":
        sys.exit(3)
    if FAULT == "floods":
        flood()
    if FAULT == "deaf":  # it does not notice that the agent is gone
        (FOLDER / "pid").write_text(str(os.getpid()))
    for line in sys.stdin:
        request = json.loads(line)
        if "id" not in request:
            continue
        response: dict[str, Any] = {"jsonrpc": "2.0", "id": request["id"]}
        if request["method"] in ("initialize", "tools/list", "tools/call"):
            response["result"] = answer(request)
        else:
            response["error"] = {"code": -32601, "message": "no such method"}
        print(json.dumps(response), flush=True)
    time.sleep(1000 if FAULT == "deaf" else 0)


if __name__ == "__main__":
    main()
