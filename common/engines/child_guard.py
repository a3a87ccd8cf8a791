"""Ends the processes of an engine when the process that has started them is gone.

Runs as a process of its own. Its standard input is a pipe that the owner holds open; each line
is the id of a process to watch over, or the path of shared memory that such a process has. When
the pipe closes, the owner has ended, even if by SIGKILL: what is still there is killed, or removed.
"""

import contextlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, cast

import psutil

_SHARED_MEMORY = re.compile(r" (/dev/shm/\S+)$", re.MULTILINE)


class ChildGuard:
    """The owner's end; `close` kills what is left."""

    def __init__(self) -> None:
        # -P: nothing beside this file is to be imported. A session of its own: the terminal's
        # Ctrl-C must not reach it.
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )
        self._pipe = cast(IO[str], self._process.stdin)
        self._others = {process.pid for process in multiprocessing.active_children()}
        self._known: set[str] = set()

    def watch(self) -> None:
        """Watch over the processes that `multiprocessing` has started since this guard was made.

        And over what those have started, and the shared memory of them all.
        """
        found: set[str] = set()
        for process in multiprocessing.active_children():
            if process.pid is not None and process.pid not in self._others:
                with contextlib.suppress(OSError, psutil.Error):  # it has just ended
                    found |= _process_tree(process.pid)
        for line in found - self._known:
            self._pipe.write(f"{line}\n")
        self._pipe.flush()
        self._known |= found

    def close(self) -> None:
        """Kill and remove what is left and wait for that."""
        self._pipe.close()
        self._process.wait()


def _process_tree(pid: int) -> set[str]:
    found: set[str] = set()
    process = psutil.Process(pid)
    for each in (process, *process.children(recursive=True)):
        found.add(str(each.pid))
        found.update(_SHARED_MEMORY.findall(Path(f"/proc/{each.pid}/maps").read_text()))
    return found


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    watched: list[int] = []
    files: list[str] = []
    for line in sys.stdin:
        if line.startswith("/"):
            files.append(line.rstrip("\n"))
            continue
        # By a descriptor: the number may belong to another process by the time it is needed.
        with contextlib.suppress(ProcessLookupError):
            watched.append(os.pidfd_open(int(line)))
    for process in watched:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, signal.SIGKILL)
    for file in files:
        Path(file).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
