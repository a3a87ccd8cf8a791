"""One child process: its output, its readiness and its end.

A child leads a session of its own, so a Ctrl-C in the terminal reaches only the launcher,
which then stops the children in order. A thread reads the child's output and its readiness
messages (sd_notify: datagrams to the socket named by NOTIFY_SOCKET) and notices its end; it
needs no event loop, so synchronous code can use a running child as well.
"""

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

from launch.errors import LaunchError
from launch.futures import new_future, wait_first
from launch.output import REQUEST_LINES

if TYPE_CHECKING:
    from launch.children import Children

READY_TIMEOUT = 60.0
STOP_TIMEOUT = 40.0  # longer than a component's own limit for its drain
LOG_LINES = 1000
SHOWN_LINES = 20

# The guard learns the process group before the program begins, so there is no moment at
# which the launcher could be killed and leave a process the guard does not know.
REGISTER_AND_EXEC = 'echo $$ >&0; exec "$@" </dev/null'


class ChildFailedError(LaunchError):
    """A child ended or did not become ready; the message has its last lines."""


class Child:
    """A program that can be started, stopped and started again. Made by `Children.start`.

    `log` holds its last lines; `status` is its last sd_notify STATUS. `ready` is done when it
    said READY=1 (or printed `ready_line`), `exited` with its exit status when it has ended,
    negative if by a signal. An end that nobody asked for through this object is a failure.
    """

    def __init__(
        self,
        owner: "Children",
        name: str,
        command: Sequence[str | Path],
        environment: Mapping[str, str],
        ready_line: str | None,
    ) -> None:
        self.name = name
        self.command = [str(part) for part in command]
        self.environment = dict(environment)
        self.ready_line = ready_line
        self.log: deque[str] = deque(maxlen=LOG_LINES)
        self.status = ""
        self.stopping = False
        self.ready: Future[None] = new_future()
        self.exited: Future[int] = new_future()
        self._owner = owner
        self._lock = threading.Lock()
        self._unfinished_line = b""
        self._process = self._start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return not self.exited.done()

    def kill(self) -> None:
        """SIGKILL to the child and every process of its session; does not wait."""
        self._send(signal.SIGKILL)

    def terminate(self) -> None:
        """SIGTERM to the child, which is to finish its work and exit; does not wait."""
        self._send(signal.SIGTERM)

    async def wait_ready(self, timeout: float = READY_TIMEOUT) -> None:
        """Wait for the readiness message.

        Raises:
            ChildFailedError: the child ended first, or `timeout` seconds went by.
        """
        await wait_first([self.ready, self.exited], timeout)
        if self.exited.done():
            raise self.failure()
        if not self.ready.done():
            raise self.failure(f"was not ready after {timeout:.0f} s")

    async def wait(self, timeout: float | None = None) -> int:
        """The exit status, once the child has ended; TimeoutError after `timeout` seconds."""
        if not await wait_first([self.exited], timeout):
            raise TimeoutError(f"{self.name} has not ended after {timeout} s")
        return self.exited.result()

    async def stop(self, timeout: float = STOP_TIMEOUT) -> int:
        """SIGTERM, then SIGKILL if it has not ended within `timeout` seconds."""
        self.terminate()
        if not await wait_first([self.exited], timeout):
            self.kill()
        return await self.wait()

    async def restart(self, timeout: float = STOP_TIMEOUT) -> None:
        """Stop it if it runs, start the same command again and wait until it is ready."""
        await self.stop(timeout)
        self.start_again()
        await self.wait_ready()

    def start_again(self) -> None:
        """Start the same command once more, after the child has ended."""
        if self.running:
            raise RuntimeError(f"{self.name} is still running")
        self.ready, self.exited = new_future(), new_future()
        self.stopping = False
        self._process = self._start()

    def failure(self, what: str | None = None) -> ChildFailedError:
        """An error that says `what` happened (by default: how it ended) with its last lines."""
        if what is None:
            status = self.exited.result()
            what = (
                f"exited with status {status}"
                if status >= 0
                else f"was killed by {signal.Signals(-status).name}"
            )
        telling = [line for line in self.log if not any(text in line for text in REQUEST_LINES)]
        lines = "\n".join(f"  {line}" for line in telling[-SHOWN_LINES:])
        status_text = f" (last status: {self.status})" if self.status else ""
        return ChildFailedError(
            f"{self.name} {what}{status_text}; its last lines:\n{lines or '  (none)'}"
        )

    def _start(self) -> "subprocess.Popen[bytes]":
        notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        notify_path = self._owner.new_path("notify")
        notify.bind(str(notify_path))
        process = subprocess.Popen(
            ["/bin/sh", "-c", REGISTER_AND_EXEC, "sh", *self.command],
            env={**os.environ, **self.environment, "NOTIFY_SOCKET": str(notify_path)},
            stdin=self._owner.guard_pipe,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._owner.on_start(self)
        threading.Thread(
            target=self._watch, args=(process, notify), name=f"watch {self.name}", daemon=True
        ).start()
        return process

    def _send(self, number: signal.Signals) -> None:
        with self._lock:
            if self._process.returncode is not None:
                return
            self.stopping = True
            if number == signal.SIGKILL:
                os.killpg(self._process.pid, number)
            else:
                os.kill(self._process.pid, number)

    def _watch(self, process: "subprocess.Popen[bytes]", notify: socket.socket) -> None:
        try:
            self._follow(process, notify)
        finally:
            # Also when a line could not be passed on: others wait for this child's end.
            with self._lock:
                # Until the leader is reaped, its group's number cannot be anyone else's.
                os.killpg(process.pid, signal.SIGKILL)
                status = process.wait()
            self._owner.on_reaped(self, process.pid)
            self.exited.set_result(status)
            if not self.stopping:
                self._owner.on_failure(self)

    def _follow(self, process: "subprocess.Popen[bytes]", notify: socket.socket) -> None:
        """Take the child's output and messages until it has ended."""
        assert process.stdout is not None  # noqa: S101 - Popen was told PIPE
        output = process.stdout.fileno()
        os.set_blocking(output, False)
        ended = os.pidfd_open(process.pid)
        try:
            with selectors.DefaultSelector() as selector:
                for source in (output, notify.fileno(), ended):
                    selector.register(source, selectors.EVENT_READ)
                sources: set[int] = set()
                while ended not in sources:
                    sources = {key.fd for key, _ in selector.select()}
                    if notify.fileno() in sources:
                        self._read_messages(notify)
                    if output in sources and not self._read_output(output):
                        selector.unregister(output)
            # What it said last, and what its own children still wrote, comes before the end.
            os.killpg(process.pid, signal.SIGKILL)
            self._read_messages(notify)
            self._read_output(output)
            if self._unfinished_line:
                self._on_line(self._unfinished_line)
        finally:
            self._unfinished_line = b""
            os.close(ended)
            process.stdout.close()
            os.unlink(notify.getsockname())
            notify.close()

    def _read_output(self, output: int) -> bool:
        """Take what the pipe holds; False at its end."""
        try:
            data = os.read(output, 1 << 20)
        except BlockingIOError:
            return True
        *lines, self._unfinished_line = (self._unfinished_line + data).split(b"\n")
        for line in lines:
            self._on_line(line)
        return bool(data)

    def _read_messages(self, notify: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                self._on_notify(notify.recv(65536, socket.MSG_DONTWAIT).decode(errors="replace"))

    def _on_line(self, raw: bytes) -> None:
        line = raw.decode(errors="replace").rstrip("\r")
        self.log.append(line)
        if self.ready_line is not None and self.ready_line in line:
            self._set_ready()
        self._owner.on_line(self.name, line)

    def _on_notify(self, message: str) -> None:
        for field in message.splitlines():
            if field == "READY=1":
                self._set_ready()
            elif field.startswith("STATUS="):
                self.status = field.removeprefix("STATUS=")

    def _set_ready(self) -> None:
        if not self.ready.done():
            self.ready.set_result(None)
