"""Run Python code in a process of its own that can do next to nothing: see `sandbox_policy.py`.

The process has no environment, no arguments but the paths it needs, and one open pipe. When this
process ends, however it does, the kernel kills it; as it cannot start others, nothing is left.
"""

import asyncio
import contextlib
import fcntl
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from chapter4 import sandbox_policy as policy
from chapter4.sandbox_child import LOCKED

_START = (
    "import sys; sys.path.insert(0, sys.argv[1]); from chapter4.sandbox_child import main; "
    "sys.path.pop(0); main(int(sys.argv[2]))"
)
_ROOT = Path(__file__).resolve().parent.parent
_MAX_OUTPUT = len(LOCKED) + policy.OUTPUT_BYTES

_PREFIX = "agent-python-"
_LEFT_AFTER_S = 60.0


class SandboxError(Exception):
    """The code did not run, or was stopped; says why."""


@dataclass(frozen=True)
class Finished:
    """How code ended by itself: what it printed (errors, too), and its exit status."""

    output: str
    status: int


async def run_python(code: str, *, wall_s: float = policy.WALL_S) -> Finished:
    """Run code; what it prints and the value of a last expression come back.

    Raises:
        SandboxError: the machine cannot restrict it, or it used more than it may.
    """
    if sys.platform != "linux":
        raise SandboxError(f"Python code runs in a sandbox of Linux; this is {sys.platform}")
    data = code.encode("utf-8", "replace")
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as folder, _in_use(folder):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", "-B", "-u", "-X", "utf8", "-c", _START),
            *(str(_ROOT), str(os.getpid())),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        output = bytearray()
        reading = asyncio.create_task(_talk(process, data, output))
        try:
            problem = await _watch(reading, folder, wall_s)
        finally:
            await _end(process, reading)
        if problem is None and len(output) > _MAX_OUTPUT:
            problem = f"printed more than {policy.OUTPUT_BYTES} bytes"
        return _finished(process.returncode or 0, bytes(output), problem)


def remove_left_folders() -> None:
    """Remove the folders of agents that were killed, and could not do so themselves."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), _in_use(str(path)):
            about = path.stat()
            if about.st_uid == os.getuid() and time.time() - about.st_mtime > _LEFT_AFTER_S:
                shutil.rmtree(path)


@contextlib.contextmanager
def _in_use(folder: str) -> Iterator[None]:
    """Hold the folder's lock; raises OSError if another process does."""
    place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(place)


async def _talk(process: asyncio.subprocess.Process, code: bytes, output: bytearray) -> None:
    """Send it the code; return when its output has ended or is too long."""
    if process.stdin is None or process.stdout is None:
        raise ValueError("the process has no pipes")
    process.stdin.write(b"%d\n%b" % (len(code), code))
    process.stdin.close()
    while len(output) <= _MAX_OUTPUT:
        piece = await process.stdout.read(policy.OUTPUT_BYTES)
        if not piece:
            await process.wait()
            return
        output += piece


async def _watch(reading: asyncio.Task[None], folder: str, wall_s: float) -> str | None:
    """Wait until the code has ended, or must be: then why."""
    loop = asyncio.get_running_loop()
    until = loop.time() + wall_s
    while not reading.done():
        if loop.time() >= until:
            return f"did not end within {wall_s:g} s"
        await asyncio.wait({reading}, timeout=policy.FOLDER_CHECK_S)
        if too_much := _too_much(folder):
            return too_much
    reading.result()
    return None


def _too_much(folder: str) -> str | None:
    size = files = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            files += 1
            size += entry.stat(follow_symlinks=False).st_blocks * 512
            if files > policy.FOLDER_FILES:
                return f"made more than {policy.FOLDER_FILES} files"
            if size > policy.FOLDER_BYTES:
                return f"wrote more than {policy.FOLDER_BYTES // 2**20} MiB"
    return None


async def _end(process: asyncio.subprocess.Process, reading: asyncio.Task[None]) -> None:
    """Kill it and wait until it is gone, also while this task is being cancelled."""
    if process.returncode is None:
        process.kill()
    reading.cancel()

    async def gone() -> None:
        await asyncio.wait({reading})
        await process.communicate()  # what is left in the pipe would keep `wait` waiting

    ending = asyncio.create_task(gone())
    cancelled = False
    while not ending.done():
        try:
            await asyncio.wait({ending})
        except asyncio.CancelledError:
            cancelled = True
    ending.result()
    if cancelled:
        raise asyncio.CancelledError


def _finished(status: int, written: bytes, problem: str | None) -> Finished:
    output = written.removeprefix(LOCKED).decode("utf-8", "replace")
    if problem is None and status >= 0 and not written.startswith(LOCKED):
        raise SandboxError(
            f"Python code cannot run here, as it cannot be restricted: {output.strip()}"
        )
    if problem is None and status < 0:
        name = signal.Signals(-status).name
        used_up = {"SIGXCPU": f"used more than {policy.CPU_S} s of CPU time"}
        problem = used_up.get(name, f"was ended by {name}")
    if problem is not None:
        printed = f"; it had printed:\n{output[:500]}" if output else ""
        raise SandboxError(f"the code {problem}{printed}")
    return Finished(output, status)
