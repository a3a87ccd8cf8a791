"""Owns child processes, so that none of them is ever left behind."""

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Self

from launch import guard
from launch.child import Child, ChildFailedError
from launch.errors import LaunchError
from launch.futures import new_future, wait_first

OnLine = Callable[[str, str], None]

KILLED_TIMEOUT = 60.0  # what is killed ends at once, but on a busy machine


class Children:
    """Owns child processes and `folder`, their temporary folder; both are gone at the end.

    A guard process (`launch.guard`) makes that true even when this process is killed.
    `on_line` gets the name of the child and the line, on the child's thread.
    """

    def __init__(self, on_line: OnLine | None = None) -> None:
        self.on_line: OnLine = on_line or (lambda name, line: None)
        self.failed: Future[ChildFailedError] = new_future()
        # Whether the others can do without a child that has ended; asked on its own thread.
        self.dispensable: Callable[[Child], bool] = lambda child: False
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="pipeline-"))
        if len(str(self.folder)) > 90:
            self.folder.rmdir()
            raise LaunchError(
                f"TMPDIR is too long for the sockets in it ({self.folder}); set a shorter one"
            )
        self._running: list[Child] = []
        self._numbers = itertools.count()
        read_end, self.guard_pipe = os.pipe()
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, str(self.folder)],
            stdin=read_end,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(read_end)
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        running = list(self._running)
        self.kill_all()
        try:
            for child in running:
                child.exited.result(KILLED_TIMEOUT)
        finally:
            os.close(self.guard_pipe)
            self._guard.wait(KILLED_TIMEOUT)
            if self.folder.exists():  # somebody killed the guard
                shutil.rmtree(self.folder)

    def start(
        self,
        name: str,
        command: Sequence[str | Path],
        environment: Mapping[str, str] | None = None,
        *,
        ready_line: str | None = None,
    ) -> Child:
        """Start `command` with `environment` added to this process's own.

        `ready_line`: for programs that do not speak sd_notify, a text that the line has which
        they print when they are ready.
        """
        return Child(self, name, command, environment or {}, ready_line)

    async def first_failure(self) -> ChildFailedError:
        """Wait until a child ends that nobody stopped and that is not dispensable."""
        await wait_first([self.failed])
        return self.failed.result()

    def kill_all(self) -> None:
        """SIGKILL to every child; does not wait."""
        for child in list(self._running):
            child.kill()

    def new_path(self, name: str) -> Path:
        """A path in `folder` that nothing else uses."""
        return self.folder / f"{name}-{next(self._numbers)}"

    def on_start(self, child: Child) -> None:
        self._running.append(child)

    def on_reaped(self, child: Child, pid: int) -> None:
        # A guard that somebody killed needs no telling.
        with contextlib.suppress(BrokenPipeError):
            os.write(self.guard_pipe, b"-%d\n" % pid)
        self._running.remove(child)  # who is in there is waited for before the pipe is closed

    def on_failure(self, child: Child) -> None:
        with self._lock:
            if not self.failed.done() and not self.dispensable(child):
                self.failed.set_result(child.failure())
