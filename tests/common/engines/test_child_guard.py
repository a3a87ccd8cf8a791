"""What an engine has started ends with its process, however that ends."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

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
