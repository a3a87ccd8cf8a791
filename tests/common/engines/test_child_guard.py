"""What an engine has started ends with its process, however that ends."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from common.engines import child_guard
from tests.chapter1.helpers import eventually
from tests.project_files import ROOT

import psutil


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def start() -> tuple[asyncio.subprocess.Process, int, list[Path]]:
    """The owner, its child's process id; its child's shared memory and the guard's folder."""
    owner = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.common.engines.guarded_owner"),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert owner.stdout is not None
    pid, *names = json.loads(await owner.stdout.readline())
    paths = [Path(name) for name in names]
    assert is_running(pid)
    assert all(path.exists() for path in paths)
    return owner, pid, paths


async def test_a_killed_owner_leaves_nothing() -> None:
    owner, pid, paths = await start()
    os.kill(owner.pid, signal.SIGKILL)
    await owner.communicate()
    await eventually(lambda: not is_running(pid))
    await eventually(lambda: not any(path.exists() for path in paths))


async def test_closing_ends_what_is_left() -> None:
    owner, pid, paths = await start()
    output, _ = await owner.communicate(b"")
    assert output == b"closed\n"
    assert not is_running(pid)
    assert not any(path.exists() for path in paths)


def test_an_owner_that_ends_before_its_guard_has_begun_leaves_nothing(
    tmp_path: Path,
) -> None:
    """What it had written until then is in the pipe."""
    owner = subprocess.Popen(["sleep", "600"])
    ended = os.pidfd_open(owner.pid)
    owner.kill()
    owner.wait()
    guard = subprocess.Popen(
        [sys.executable, "-P", child_guard.__file__, str(ended)],
        stdin=subprocess.PIPE,
        pass_fds=[ended],
    )
    os.close(ended)
    assert guard.stdin is not None
    victim = subprocess.Popen(["sleep", "600"])
    try:
        with guard.stdin as pipe:
            pipe.write(f"{victim.pid}\n{tmp_path}\n".encode())
            pipe.flush()
            assert guard.wait(timeout=60) == 0
        assert victim.wait(timeout=60) == -signal.SIGKILL
    finally:
        victim.kill()
        victim.wait()
    assert not tmp_path.exists()
