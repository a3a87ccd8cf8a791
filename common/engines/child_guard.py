"""Ends the processes of an engine when the process that has started them is gone.

Runs as a process of its own, which is given a descriptor of the owner. Each line that it reads is
the id of a process to watch over, or a path: shared memory that such a process has, or a folder
of its. After an empty line, or when the owner has ended, even if by SIGKILL, what is still there
is killed, or removed.
"""

import contextlib
import logging
import multiprocessing
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, cast

import psutil

_log = logging.getLogger(__name__)

_SHARED_MEMORY = re.compile(r" (/dev/shm/\S+)$", re.MULTILINE)


class ChildGuard:
    """The owner's end; `close` kills and removes what is left, and `folder` with all in it."""

    def __init__(self, name: str) -> None:
        self.folder = tempfile.mkdtemp(prefix=f"{name}-")
        # -P: nothing beside this file is to be imported. A session of its own: the terminal's
        # Ctrl-C must not reach it.
        owner = os.pidfd_open(os.getpid())
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(owner)],
                stdin=subprocess.PIPE,
                pass_fds=[owner],
                start_new_session=True,
                text=True,
            )
        finally:
            os.close(owner)
        self._pipe = cast(IO[str], self._process.stdin)
        self._others = {process.pid for process in multiprocessing.active_children()}
        self._known: set[str] = set()
        self._tell({self.folder})

    def watch(self) -> None:
        """Watch over the processes that `multiprocessing` has spawned since this guard was made.

        And over what those have started, and the shared memory of them all.
        """
        found: set[str] = set()
        for process in self._processes():
            with contextlib.suppress(OSError, psutil.Error):  # it has just ended
                found |= _process_tree(process.pid)
        self._tell(found)

    def kill(self) -> None:
        """Kill all that there is by now."""
        self.watch()
        for process in self._processes():
            process.kill()

    def close(self) -> None:
        """See above; waits until it is done."""
        with contextlib.suppress(BrokenPipeError):  # somebody has killed the guard
            self._pipe.write("\n")
            self._pipe.flush()
        with contextlib.suppress(BrokenPipeError):
            self._pipe.close()
        self._process.wait()
        for process in self._processes():
            if str(process.pid) in self._known:
                process.kill()
                process.join()
        _remove(path for path in self._known if path.startswith("/"))

    def _processes(self) -> list[BaseProcess]:
        children = multiprocessing.active_children()
        return [process for process in children if process.pid not in self._others]

    def _tell(self, lines: set[str]) -> None:
        new = lines - self._known
        self._known |= new
        try:
            self._pipe.write("".join(f"{line}\n" for line in new))
            self._pipe.flush()
        except BrokenPipeError:
            _log.warning("the guard was killed: the engine's processes may outlive this one")


def _process_tree(pid: int | None) -> set[str]:
    found: set[str] = set()
    process = psutil.Process(pid)
    for each in (process, *process.children(recursive=True)):
        found.add(str(each.pid))
        found.update(_SHARED_MEMORY.findall(Path(f"/proc/{each.pid}/maps").read_text()))
    return found


def _lines(ended: int) -> Iterator[str]:
    """What the owner writes until it says that this is all, or ends: `ended` is readable.

    The pipe need not close then: a process that it forked may have it open. And the owner may
    have ended before this process has begun.
    """
    stdin = sys.stdin.fileno()
    os.set_blocking(stdin, False)
    text = ""
    while True:
        ready, _, _ = select.select([stdin, ended], [], [])
        with contextlib.suppress(BlockingIOError):
            text += os.read(stdin, 65536).decode()
        *lines, text = text.split("\n")
        for line in lines:
            if not line:
                return
            yield line
        if ended in ready:
            return


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    watched: list[int] = []
    paths: list[str] = []
    for line in _lines(int(sys.argv[1])):
        if line.startswith("/"):
            paths.append(line)
            continue
        # By a descriptor: the number may belong to another process by the time it is needed.
        with contextlib.suppress(ProcessLookupError):
            watched.append(os.pidfd_open(int(line)))
    for process in watched:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, signal.SIGKILL)
    _remove(paths)


def _remove(paths: Iterable[str]) -> None:
    for path in paths:
        if Path(path).is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            Path(path).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
