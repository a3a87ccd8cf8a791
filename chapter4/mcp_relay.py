"""Stands between the agent and an MCP server that is a process: `python mcp_relay.py COMMAND…`.

It passes lines on in both directions and sees to what the server may not be able to: a line, which
the agent must hold in memory, is bounded, and so is what goes to the agent's log; and when the
agent ends, however it does, or the server does, all processes of their group are killed. It uses
nothing but Python's library.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import NoReturn

MAX_LINE = 4 * 2**20  # bytes
MAX_LOG = 64 * 2**10  # bytes
BUFFER = 2**16  # bytes
# What the server has to end when the agent is gone.
GRACE_S = 1.0


@dataclass
class _Pipe:
    """From one descriptor to another; at most about `BUFFER` bytes wait in between."""

    source: int
    target: int
    ended: bool = False
    waiting: bytearray = field(default_factory=bytearray)
    line: int = 0  # bytes since the last end of a line

    def read(self) -> None:
        piece = os.read(self.source, BUFFER)
        self.ended = not piece
        last = piece.rfind(b"\n")
        self.line = self.line + len(piece) if last < 0 else len(piece) - last - 1
        self.waiting += piece

    def write(self) -> None:
        del self.waiting[: os.write(self.target, self.waiting)]


def main(command: list[str]) -> NoReturn:
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, lambda *_: _end())
    try:
        server = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")
    if server.stdin is None or server.stdout is None or server.stderr is None:
        raise ValueError("the server has no pipes")
    for pipe in (server.stdin, server.stdout, server.stderr):
        os.set_blocking(pipe.fileno(), False)
    os.set_blocking(1, False)
    to_server = _Pipe(0, server.stdin.fileno())
    to_agent = _Pipe(server.stdout.fileno(), 1)
    with contextlib.suppress(OSError):  # one side is gone
        _relay(to_server, to_agent, server.stderr.fileno())
    _end()


def _relay(to_server: _Pipe, to_agent: _Pipe, log: int) -> None:
    """Until the server's output has ended, or the agent has, and the grace is over."""
    logged = 0
    until: float | None = None
    while not (to_agent.ended and not to_agent.waiting):
        ready = _wait(to_server, to_agent, log, until)
        if until is not None and time.monotonic() >= until:
            return
        for pipe in (to_server, to_agent):
            if ready.get(pipe.source, 0) and len(pipe.waiting) < BUFFER:
                pipe.read()
            if ready.get(pipe.target, 0):
                pipe.write()
        if to_agent.line > MAX_LINE:
            print(f"the MCP server sent a line of more than {MAX_LINE} bytes", file=sys.stderr)
            return
        if ready.get(to_server.source, 0) & select.POLLHUP and until is None:
            until = time.monotonic() + GRACE_S
        if to_server.ended and not to_server.waiting and to_server.target >= 0:
            os.close(to_server.target)
            to_server.target = -1
        if ready.get(log, 0):
            piece = os.read(log, BUFFER)
            os.write(2, piece[: max(0, MAX_LOG - logged)])
            logged += len(piece)
            log = log if piece else -1


def _wait(to_server: _Pipe, to_agent: _Pipe, log: int, until: float | None) -> dict[int, int]:
    """What can be read or written, by descriptor, at `until` at the latest."""
    poll = select.poll()
    for pipe in (to_server, to_agent):
        if not pipe.ended and len(pipe.waiting) < BUFFER:
            poll.register(pipe.source, select.POLLIN)
        if pipe.waiting and pipe.target >= 0:
            poll.register(pipe.target, select.POLLOUT)
    if not to_server.ended and len(to_server.waiting) >= BUFFER and until is None:
        poll.register(to_server.source, 0)  # there is no room, but is the agent still there?
    if log >= 0:
        poll.register(log, select.POLLIN)
    left = None if until is None else max(0.0, until - time.monotonic()) * 1000
    return dict(poll.poll(left))


def _end() -> NoReturn:
    os.killpg(0, signal.SIGKILL)
    sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
