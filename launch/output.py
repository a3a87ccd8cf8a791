"""Progress and the children's log lines, on standard error."""

import contextlib
import itertools
import os
import sys
import threading

COLOURS = ("36", "32", "33", "35", "34", "31", "96", "92")

# The runtime writes a line per request and hop whatever its log level.
REQUEST_LINES = ("route request completed", "request_span")
# NATS tells its life at start, and etcd that its own proxy tried before it listened.
ROUTINE_LINES = (*REQUEST_LINES, "[INF]", "[core] grpc:")


def say(text: str) -> None:
    """Print a line on standard error; nothing if its reader is gone or its disk is full."""
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


class LogPrinter:
    """Writes lines to standard error, prefixed with the child's name in its own colour."""

    def __init__(self, *, verbose: bool) -> None:
        self._verbose = verbose
        self._colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
        self._colours: dict[str, str] = {}
        self._next_colour = itertools.cycle(COLOURS)
        self._lock = threading.Lock()

    def __call__(self, name: str, line: str) -> None:
        """Print one line of the child `name`; routine lines only if verbose."""
        if not self._verbose and any(text in line for text in ROUTINE_LINES):
            return
        with self._lock:
            prefix = f"{name:>10} | "
            if self._colour:
                if name not in self._colours:
                    self._colours[name] = next(self._next_colour)
                prefix = f"\033[{self._colours[name]}m{prefix}\033[0m"
            say(f"{prefix}{line}")
