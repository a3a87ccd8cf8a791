"""The supervision of child processes, with small programs in their place."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from launch.child import ChildFailedError
from launch.children import Children

import pytest

READY = """
import os, socket
def ready(message=b"READY=1"):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.connect(os.environ["NOTIFY_SOCKET"])
        notify.send(message)
"""


def program(code: str) -> list[str]:
    return [sys.executable, "-u", "-c", READY + code]


SERVE_WITH_STATUS = program("import signal; ready(b'STATUS=loading\\nREADY=1'); signal.pause()")
SERVE = program("import signal; ready(); signal.pause()")


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], bool], what: str, timeout: float = 20) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        time.sleep(0.01)


def wait_until_gone(pids: list[int]) -> None:
    wait_until(lambda: not any(alive(pid) for pid in pids), f"the end of processes {pids}")


async def test_ready_and_status_come_by_message(children: Children) -> None:
    child = children.start("a", SERVE_WITH_STATUS)
    await child.wait_ready()
    assert child.status == "loading"


async def test_not_ready_in_time_names_the_last_status(children: Children) -> None:
    child = children.start(
        "a", program("import signal; ready(b'STATUS=loading'); print('here'); signal.pause()")
    )
    wait_until(lambda: bool(child.status and child.log), "status and output")
    with pytest.raises(ChildFailedError, match=r"(?s)not ready after .*loading.*here"):
        await child.wait_ready(timeout=0.01)


async def test_a_crash_shows_status_and_last_lines(children: Children) -> None:
    child = children.start("a", program("print('line 1\\nline 2', end=''); raise SystemExit(3)"))
    with pytest.raises(ChildFailedError, match="a exited with status 3") as failure:
        await child.wait_ready()
    assert str(failure.value).endswith("  line 1\n  line 2")
    assert str(await children.first_failure()) == str(failure.value)


async def test_what_a_child_says_last_is_heard_however_soon_it_ends(children: Children) -> None:
    child = children.start("a", program("for i in range(100): ready(b'STATUS=%d' % i)"))
    with pytest.raises(ChildFailedError, match="last status: 99"):
        await child.wait_ready()


async def test_only_the_last_twenty_lines_are_shown(children: Children) -> None:
    child = children.start("a", program("for i in range(100): print('line', i)"))
    with pytest.raises(ChildFailedError) as failure:
        await child.wait_ready()
    lines = str(failure.value).splitlines()
    assert lines[1:] == [f"  line {i}" for i in range(80, 100)]


async def test_the_last_lines_are_not_those_about_requests(children: Children) -> None:
    """The runtime writes one per request and hop; they would hide what happened."""
    child = children.start(
        "a", program("print('out of memory')\nfor i in range(99): print('route request completed')")
    )
    with pytest.raises(ChildFailedError, match=r"its last lines:\n  out of memory$"):
        await child.wait_ready()


async def test_a_line_that_cannot_be_passed_on_ends_the_child() -> None:
    """Nobody may wait for ever for a child whose output nobody reads any more."""

    def fail(name: str, line: str) -> None:
        raise OSError(f"no space left for {line}")

    threads: list[threading.ExceptHookArgs] = []
    with pytest.MonkeyPatch.context() as patch, Children(fail) as children:
        patch.setattr(threading, "excepthook", threads.append)
        child = children.start(
            "a", program("print('line', flush=True)\nimport signal; signal.pause()")
        )
        assert await child.wait(timeout=20) == -signal.SIGKILL
        assert str(await children.first_failure()).endswith("  line")
    assert [str(thread.exc_value) for thread in threads] == ["no space left for line"]


async def test_a_signal_from_elsewhere_is_a_failure(children: Children) -> None:
    child = children.start("a", SERVE)
    await child.wait_ready()
    os.kill(child.pid, signal.SIGKILL)
    assert "a was killed by SIGKILL" in str(await children.first_failure())


async def test_a_program_that_does_not_exist(children: Children) -> None:
    child = children.start("a", ["/no/such/program"])
    with pytest.raises(ChildFailedError, match="/no/such/program"):
        await child.wait_ready()


async def test_stop_lets_the_child_finish(children: Children) -> None:
    child = children.start(
        "a",
        program("""
import signal, sys
def end(*_):
    print("drained")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
ready()
signal.pause()
"""),
    )
    await child.wait_ready()
    assert await child.stop() == 0
    assert child.log[-1] == "drained"
    assert not children.failed.done(), "an end that was asked for is no failure"


async def test_stop_kills_a_child_that_does_not_end(children: Children) -> None:
    child = children.start(
        "a",
        program(
            "import signal; signal.signal(15, signal.SIG_IGN); ready()\nwhile 1: signal.pause()"
        ),
    )
    await child.wait_ready()
    assert await child.stop(timeout=0.1) == -signal.SIGKILL


async def test_restart(children: Children) -> None:
    child = children.start("a", SERVE)
    await child.wait_ready()
    first_pid = child.pid
    await child.restart()
    assert child.running
    assert child.pid != first_pid


async def test_a_waiter_that_gives_up_leaves_the_others_waiting(children: Children) -> None:
    child = children.start("a", SERVE)
    with pytest.raises(TimeoutError):
        await child.wait(timeout=0.01)
    waiting = asyncio.ensure_future(child.wait())
    given_up = asyncio.ensure_future(child.wait())
    await asyncio.sleep(0)
    given_up.cancel()
    child.kill()
    assert await waiting == -signal.SIGKILL


async def test_much_output_does_not_block_a_child_while_the_loop_is_busy(
    children: Children,
) -> None:
    """Synchronous tests block the event loop while the children go on writing."""
    child = children.start(
        "a",
        program(
            "print('x' * 99 + '\\n' * 1, end='')\nfor i in range(5000): print('y' * 99)\nready()"
        ),
    )
    assert child.ready.result(timeout=20) is None


async def test_grandchildren_end_with_the_child(children: Children) -> None:
    """An engine's own worker processes must not outlive an engine that crashed."""
    child = children.start(
        "a",
        program("""
import subprocess, sys
p = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
print(p.pid)
ready()
sys.exit(1)
"""),
    )
    await child.wait()
    wait_until_gone([int(child.log[0])])


def test_nothing_is_left_when_the_block_ends() -> None:
    with Children() as children:
        child = children.start("a", SERVE)
        assert child.ready.result(timeout=20) is None
        (children.folder / "file").write_text("x")
        guard = children._guard.pid
    assert not children.folder.exists()
    assert not alive(child.pid)
    assert not alive(guard)


def test_the_folder_goes_even_when_somebody_killed_the_guard() -> None:
    with Children() as children:
        children._guard.kill()
        children._guard.wait()
    assert not children.folder.exists()


OWNER = """
import sys, signal
from launch.children import Children
with Children() as children:
    for i in range(3):
        child = children.start(str(i), [sys.executable, "-c", sys.argv[1]])
        child.ready.result(timeout=20) if i else None
        print(child.pid, flush=True)
    print(children._guard.pid)
    print(children.folder, flush=True)
    signal.pause()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP, signal.SIGTERM])
def test_nothing_is_left_when_the_owner_is_killed(number: signal.Signals) -> None:
    """`kill -9` of the launcher must end its children and remove its folder."""
    stubborn = READY + (
        "import signal, subprocess, sys\n"
        "for n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\n"
        "ready()\n"
        "while 1: signal.pause()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, stubborn], stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        lines = [owner.stdout.readline().strip() for _ in range(5)]
        folder = Path(lines.pop())
        pids = [int(line) for line in lines]
        assert folder.is_dir()
        assert all(alive(pid) for pid in pids)
        owner.send_signal(number)
    wait_until_gone(pids)
    assert not folder.exists()
