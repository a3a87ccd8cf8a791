"""Code in the sandbox reaches nothing but Python and its folder, and ends when it must."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from chapter4 import builtin_tools, sandbox, sandbox_policy
from chapter4.builtin_tools import python_tool
from chapter4.sandbox import Finished, SandboxError, run_python
from tests.chapter4.tool_calls import call
from tests.project_files import ROOT

import psutil
import pytest

DENIED = "PermissionError"
# On a busy machine the code gets more time than in use; only tests of the limit take less.
WALL_S = 60.0


async def run(code: str) -> Finished:
    return await run_python(code, wall_s=WALL_S)


def changed(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    """Change something of `sandbox_kernel`, called k, in the process before it locks itself up."""
    before = "sys.path.pop(0)"
    assert before in sandbox._START
    after = f"import chapter4.sandbox_kernel as k; {change}; {before}"
    monkeypatch.setattr(sandbox, "_START", sandbox._START.replace(before, after))


async def denied(code: str) -> None:
    """The code ends with a PermissionError, and prints nothing before."""
    finished = await run(code)
    assert finished.status == 1, finished.output
    assert finished.output.startswith("Traceback"), finished.output
    assert DENIED in finished.output.splitlines()[-1], finished.output


@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("print('a')\n1 + 1", "a\n2\n"),
        ("x = 3", ""),
        ("import json, math, re, datetime, decimal, hashlib, zlib, sqlite3, statistics", ""),
        ("hashlib = __import__('hashlib'); hashlib.sha256(b'').hexdigest()[:8]", "'e3b0c442'\n"),
        ("open('a.txt', 'w').write('x'); import os; os.listdir(), open('a.txt').read()",
         "(['a.txt'], 'x')\n"),
        ("class A: pass\nfrom dataclasses import dataclass\n@dataclass\nclass B:\n  x: int\nB(1)",
         "B(x=1)\n"),
        ("import time, random; time.sleep(0.001); 0 <= random.random() < 1", "True\n"),
        ("'\\N{SNOWMAN}'", "'\N{SNOWMAN}'\n"),
        ("try:\n  input()\nexcept EOFError:\n  print('no input')", "no input\n"),
        ("import sys; sys.argv = []; sys.exit()", ""),
    ],
)  # fmt: skip
async def test_ordinary_code_runs(code: str, output: str) -> None:
    assert await run(code) == Finished(output, 0)


async def test_an_error_of_the_code_is_its_output() -> None:
    finished = await run("print('before')\ndef f():\n    return 1 / 0\nf()")
    assert finished.status == 1
    assert finished.output == (
        'before\nTraceback (most recent call last):\n  File "<code>", line 4, in <module>\n'
        '    f()\n  File "<code>", line 3, in f\n    return 1 / 0\n           ~~^~~\n'
        "ZeroDivisionError: division by zero\n"
    )


@pytest.mark.parametrize(
    ("code", "status", "output"),
    [
        ("raise SystemExit(3)", 3, ""),
        ("import sys; sys.exit('bye')", 1, "bye\n"),
        ("raise SystemExit(125)", 125, ""),
        ("import os; os._exit(125)", 125, ""),
        ("import os; os._exit(1)", 1, ""),
        ("print('\\0x')", 0, "\0x\n"),
    ],
)
async def test_the_exit_status_comes_back(code: str, status: int, output: str) -> None:
    assert await run(code) == Finished(output, status)


# -- Files. ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "/etc/hostname",
        "/proc/self/environ",
        "/proc/self/maps",
        "/proc/1/cmdline",
        "/sys/kernel/ostype",
        "/dev/zero",
        "/proc/{parent}/environ",
        "/proc/{parent}/cwd/pyproject.toml",
        "{root}/pyproject.toml",
        "{root}/chapter4/sandbox_child.py",
        "../../../../../../../../etc/passwd",
        "{outside}",
    ],
)
async def test_nothing_else_is_read(path: str, outside: Path) -> None:
    path = path.format(parent=os.getpid(), root=ROOT, outside=outside)
    finished = await run(f"open({path!r}, 'rb').read(10)")
    assert finished.status == 1, finished.output
    assert finished.output.rstrip().splitlines()[-1].startswith((DENIED, "FileNotFoundError"))


@pytest.mark.parametrize("path", ["/dev/zero", "/etc/passwd", "own"])
@pytest.mark.parametrize("flags", ["3", "3 | os.O_CREAT", "3 | os.O_NONBLOCK"])
async def test_no_file_is_opened_for_neither_reading_nor_writing(path: str, flags: str) -> None:
    """Landlock lets each file be opened in the access mode 3, which is for ioctl."""
    await denied(f"import os\nopen('own', 'w').close()\nos.open({path!r}, {flags})")


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A file that anybody might read and write, but for the sandbox."""
    path = tmp_path / "secret.txt"
    path.write_text("secret")
    path.chmod(0o666)
    return path


def state(file: Path) -> tuple[str, int, int, list[Path]]:
    """What must not change: the text, mode and time of a file, and what is beside it."""
    about = file.stat()
    return file.read_text(), about.st_mode, about.st_mtime_ns, sorted(file.parent.iterdir())


@pytest.mark.parametrize("folder", ["/", "/etc", "/proc", "/tmp", "..", str(ROOT), "/proc/self/fd"])  # noqa: S108
async def test_no_other_folder_is_listed(folder: str) -> None:
    await denied(f"import os; print(os.listdir({folder!r}))")


async def test_third_party_packages_are_not_read() -> None:
    finished = await run(
        "import os, sys\n"
        "found = [p for p in sys.path if os.path.isdir(p + '/site-packages')]\n"
        "for place in found:\n"
        "    for name in os.listdir(place + '/site-packages'):\n"
        "        try:\n"
        "            os.listdir(f'{place}/site-packages/{name}')\n"
        "            open(f'{place}/site-packages/{name}')\n"
        "            print('read', name)\n"
        "        except OSError: pass\n"
    )
    assert finished == Finished("", 0)


@pytest.mark.parametrize(
    "code",
    [
        "open({path!r}, 'w')",
        "open({path!r}, 'a')",
        "open({path!r}, 'r+')",
        "os.open({path!r}, os.O_RDONLY | os.O_TRUNC)",
        "os.open({path!r}, 3)",
        "os.open({path!r}, 3 | os.O_TRUNC)",
        "os.truncate({path!r}, 0)",
        "os.remove({path!r})",
        "os.chmod({path!r}, 0)",
        "os.chown({path!r}, 0, 0)",
        "os.utime({path!r})",
        "os.rename({path!r}, 'x')",
        "os.link({path!r}, 'x')",
        "os.setxattr({path!r}, 'user.x', b'')",
        "open({path!r} + '.new', 'w')",
        "os.mkdir({path!r} + '.d')",
        "os.symlink('/etc/passwd', {path!r} + '.l')",
    ],
)
async def test_nothing_outside_is_changed(code: str, outside: Path) -> None:
    before = state(outside)
    await denied("import os\n" + code.format(path=str(outside)))
    assert state(outside) == before


@pytest.mark.parametrize(
    "code",
    [
        "os.symlink('/etc/passwd', 'link')",
        "os.link('/etc/passwd', 'link')",
        "os.mkdir('folder')",
        "os.mkfifo('pipe')",
        "os.mknod('device', 0o20666, os.makedev(1, 3))",
        "open('a', 'w'); os.remove('a')",
        "open('a', 'w'); os.rename('a', 'b')",
        "os.open('.', os.O_TMPFILE | os.O_RDWR)",
        "os.memfd_create('x')",
        "open('/dev/shm/x', 'w')",
        "os.chroot('.')",
    ],
)
async def test_the_folder_holds_plain_files_alone(code: str) -> None:
    """Neither a way out of it, nor a file that the parent's look at the folder would miss."""
    await denied("import os\n" + code)


async def test_a_symlink_that_others_put_there_leads_nowhere(
    monkeypatch: pytest.MonkeyPatch, outside: Path
) -> None:
    make = tempfile.TemporaryDirectory

    def with_link(prefix: str) -> "tempfile.TemporaryDirectory[str]":
        folder = make(prefix=prefix)
        Path(folder.name, "link").symlink_to(outside)
        return folder

    monkeypatch.setattr(tempfile, "TemporaryDirectory", with_link)
    await denied("open('link').read()")


async def test_the_folder_is_gone_afterwards_and_nobody_elses() -> None:
    finished = await run("import os; open('x', 'w').write('x'); print(os.getcwd())")
    folder = finished.output.strip()
    assert os.path.isabs(folder)
    assert os.path.basename(folder) not in os.listdir(tempfile.gettempdir())
    assert (await run("import os; os.listdir()")).output == "[]\n"


# -- The environment, other processes, the network. -----------------------------------------------


async def test_no_secret_of_the_environment_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    finished = await run("import os; print(set(os.environ) - {'LC_CTYPE'})")
    assert finished.output == "set()\n"


async def test_no_open_file_of_the_agent_is_there(outside: Path) -> None:
    with outside.open() as file:
        os.set_inheritable(file.fileno(), True)
        finished = await run(
            "import os\n"
            "for fd in range(3, 1000):\n"
            "    try: print(fd, os.fstat(fd))\n"
            "    except OSError: pass"
        )
    assert finished.output == ""


@pytest.mark.parametrize(
    "code",
    [
        "os.fork()",
        "os.forkpty()",
        "while True: os.fork()",
        "import subprocess; subprocess.run(['/bin/true'])",
        "assert os.system('true') != 0; os.execv('/bin/true', ['true'])",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "os.kill(os.getppid(), 9)",
        "os.kill(os.getpid(), 9)",
        "os.kill(-1, 9)",
        "os.killpg(0, 9)",
        "os.pidfd_open(os.getppid())",
        "import fcntl; fcntl.fcntl(1, fcntl.F_SETOWN, os.getppid())",
        "import fcntl; fcntl.fcntl(1, 10, 9)",
        "import fcntl; fcntl.ioctl(0, 0x5412, b'x')",
        "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
        "os.sched_setaffinity(os.getppid(), {0})",
        "import resource; resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (0, 0))",
        "os.setsid()",
        "os.setuid(1)",
        "import socket; socket.socket(socket.AF_INET, socket.SOCK_STREAM)",
        "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
        "import socket; socket.socket(socket.AF_INET6, socket.SOCK_STREAM)",
        "import socket; socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)",
        "import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
        "import socket; socket.socketpair()",
    ],
)
async def test_no_process_and_no_socket_is_reached(code: str) -> None:
    await denied("import os\n" + code)


async def test_there_are_no_threads() -> None:
    finished = await run("import threading; threading.Thread(target=print).start()")
    assert "can't start new thread" in finished.output


# By number, as C code would: the numbers of x86_64 and aarch64.
CALLS = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "mount": (165, 40),
    "unshare": (272, 97),
    "setns": (308, 268),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "io_uring_setup": (425, 425),
    "userfaultfd": (323, 282),
    "keyctl": (250, 219),
    "shmget": (29, 194),
    "openat2": (437, 437),
    "clone3": (435, 435),
    "prctl": (157, 167),
    "seccomp": (317, 277),
    "init_module": (175, 105),
    "pidfd_getfd": (438, 438),
    "memfd_secret": (447, 447),
}


@pytest.mark.parametrize("name", CALLS)
async def test_no_dangerous_call_of_the_kernel_is_made(name: str) -> None:
    finished = await run(
        "import ctypes, errno, platform\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        f"number = {CALLS[name]}[platform.machine() == 'aarch64']\n"
        "libc.syscall(number, 0, 0, 0, 0, 0, 0), errno.errorcode[ctypes.get_errno()]"
    )
    assert finished.output == "(-1, 'EPERM')\n"


async def test_calls_by_another_abi_end_it() -> None:
    """These are numbers of x86_64's x32; other machines have no calls with such numbers."""
    with pytest.raises(SandboxError, match="SIGSYS"):
        await run("import ctypes; ctypes.CDLL(None).syscall(0x40000000 + 39)")


async def test_a_listening_server_of_this_machine_hears_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        port = server.getsockname()[1]
        await denied(f"import socket\nsocket.create_connection(('127.0.0.1', {port}))")
        with pytest.raises(BlockingIOError):
            server.accept()


# -- Limits. --------------------------------------------------------------------------------------


async def test_an_endless_loop_ends() -> None:
    with pytest.raises(SandboxError, match=r"did not end within 0\.5 s"):
        await run_python("while True: pass", wall_s=0.5)


async def test_code_that_is_ended_cannot_prevent_it_and_what_it_printed_is_told() -> None:
    """Signals that Python could catch are of no use to the code."""
    code = (
        "import itertools, signal, time\n"
        "for number in range(1, 32):\n"
        "    try: signal.signal(number, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\n"
        "print('began')\n"
        "for n in itertools.count():\n"
        "    open(str(n), 'w').close(); time.sleep(0.005)"
    )
    with pytest.raises(SandboxError, match=r"256 files; it had printed:\nbegan"):
        await run(code)


async def test_the_kernel_ends_a_loop_when_the_parent_is_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changed(monkeypatch, "k.policy.CPU_S = 1")
    with pytest.raises(SandboxError, match="used more than 10 s of CPU time"):
        await run("while True: pass")


async def test_limits_cannot_be_raised() -> None:
    finished = await run("import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))")
    assert finished.status == 1
    assert "Error" in finished.output.splitlines()[-1]


async def test_memory_is_limited() -> None:
    finished = await run("x = bytearray(2 ** 32)")
    assert finished.output.splitlines()[-1] == "MemoryError"
    finished = await run("import mmap; mmap.mmap(-1, 2 ** 32)")
    assert "Cannot allocate memory" in finished.output


async def test_as_much_output_as_is_allowed_comes_back() -> None:
    much = sandbox_policy.OUTPUT_BYTES
    assert await run(f"print('x' * {much - 1})") == Finished("x" * (much - 1) + "\n", 0)
    with pytest.raises(SandboxError, match="printed more than 65536 bytes"):
        await run(f"print('x' * {much})")


async def test_a_gigabyte_of_output_is_not_stored() -> None:
    before = psutil.Process().memory_info().rss
    with pytest.raises(SandboxError, match="printed more than 65536 bytes") as caught:
        await run("while True: print('x' * 100_000)")
    assert len(str(caught.value)) < 1000
    assert psutil.Process().memory_info().rss - before < 50 * 2**20


async def test_a_file_is_limited() -> None:
    finished = await run(f"open('x', 'wb').write(b'x' * {2 * sandbox_policy.FILE_BYTES})")
    assert "File too large" in finished.output


async def test_all_files_together_are_limited() -> None:
    code = (
        "import itertools, time\n"
        "for n in itertools.count():\n"
        "    open(str(n), 'wb').write(b'x' * 4_000_000)\n"
        "    time.sleep(0.005)"  # so that the test's own disk stays empty
    )
    with pytest.raises(SandboxError, match="wrote more than 32 MiB"):
        await run(code)


async def test_open_files_are_limited() -> None:
    assert "Too many open files" in (await run("x = [open('x', 'w') for _ in range(99)]")).output


async def test_code_that_crashes_python_harms_nobody() -> None:
    with pytest.raises(SandboxError, match="SIGSEGV"):
        await run("import ctypes; ctypes.string_at(0)")


# -- The end. -------------------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[psutil.Process]:
    """The processes that `run_python` starts."""
    found: list[psutil.Process] = []
    start = asyncio.create_subprocess_exec

    async def remember(*arguments: str, **options: object) -> asyncio.subprocess.Process:
        process = await start(*arguments, **options)  # type: ignore[arg-type]
        found.append(psutil.Process(process.pid))
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", remember)
    return found


async def test_a_cancelled_call_leaves_no_process(started: list[psutil.Process]) -> None:
    task = asyncio.create_task(run("import time; time.sleep(1000)"))
    while not started:
        await asyncio.wait({task}, timeout=0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not started[0].is_running()


def test_when_the_agent_is_killed_the_code_is_too(tmp_path: Path) -> None:
    """Also when it is killed with SIGKILL, and can tell nobody."""
    agent = subprocess.Popen(
        [sys.executable, "-c", AGENT],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert agent.stdout is not None
        code = psutil.Process(int(agent.stdout.readline()))
        agent.send_signal(signal.SIGKILL)
        agent.wait()
        code.wait(timeout=60)  # raises if it is still there
    finally:
        agent.kill()
        agent.communicate()


AGENT = """
import asyncio, os
from chapter4 import sandbox
start = asyncio.create_subprocess_exec
async def remember(*arguments, **options):
    process = await start(*arguments, **options)
    print(process.pid, flush=True)
    return process
asyncio.create_subprocess_exec = remember
asyncio.run(sandbox.run_python("import time; time.sleep(1000)", wall_s=1000))
"""


# -- Machines that lack something, and other users. -----------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("k.CREATE_RULESET = 9999", "Landlock is missing (Linux 5.13 or newer"),
        ("k.PR_SET_SECCOMP = 9999", "seccomp: Invalid argument"),
        ("k.PR_SET_NO_NEW_PRIVS = 9999", "PR_SET_NO_NEW_PRIVS"),
        ("k.platform.machine = lambda: 'riscv64'", "not of riscv64"),
        ("k._restrict_calls = print", "seccomp restricts nothing"),
        ("k._restrict_files = lambda *_: None", "Landlock restricts nothing"),
        ("k.policy.OPEN_FILES = 2**40", "not allowed to raise"),
        ("k.os.getppid = lambda: 1", "the process that started it has ended"),
        ("k.lock_up = None", "TypeError"),
    ],
)
async def test_where_it_cannot_be_restricted_code_does_not_run(
    monkeypatch: pytest.MonkeyPatch, change: str, reason: str
) -> None:
    changed(monkeypatch, change)
    with pytest.raises(SandboxError, match="cannot run here") as caught:
        await run("print('it ran')")
    assert reason in str(caught.value)
    assert "it ran" not in str(caught.value)


async def test_elsewhere_than_on_linux_code_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SandboxError, match="this is darwin"):
        await run("print('it ran')")


UNPRIVILEGED = """
import asyncio, ctypes, json, os, struct, sys
user = int(sys.argv[1])
if user:
    os.setgroups([]); os.setgid(user); os.setuid(user)
ctypes.CDLL(None).capset(struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *[0] * 6))
sys.path.insert(0, os.getcwd())
from chapter4 import sandbox
finished = asyncio.run(sandbox.run_python(sys.argv[2], wall_s=60))
print(json.dumps([finished.output, finished.status]))
"""
ATTACKS = """
import os, socket
for attack in (lambda: open("/etc/passwd"), lambda: os.listdir("/"),
               lambda: open("/tmp/none", "w"), os.fork, socket.socket, lambda: os.kill(1, 0)):
    try:
        attack()
        print("done")
    except PermissionError:
        pass
open("mine", "w").write("x")
print("end")
"""
NOBODY = 65534


def unprivileged() -> Iterator[tuple[str, int]]:
    """Pythons that another user can run, with its number; this user without capabilities."""
    yield sys.executable, 0
    if os.getuid() != 0:
        return
    for python in (sys.executable, "/usr/bin/python3"):
        check = [
            python,
            "-c",
            f"import sys; assert sys.version_info >= (3, 11); open({__file__!r})",
        ]
        try:
            done = subprocess.run(check, user=NOBODY, group=NOBODY, extra_groups=[], stderr=-3)
        except OSError:  # it is in a folder of root's
            continue
        if done.returncode == 0:
            yield python, NOBODY


def test_it_holds_without_any_privilege() -> None:
    """Root without its capabilities is nobody to the kernel; another user besides, if one can."""
    for python, user in unprivileged():
        command = [python, "-I", "-c", UNPRIVILEGED, str(user), ATTACKS]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.stdout, (python, user, done.stderr)
        assert json.loads(done.stdout) == ["end\n", 0], (python, user)


# -- The tool. ------------------------------------------------------------------------------------


async def test_folders_of_killed_agents_are_removed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Those of agents that run, and new ones, are not."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, used, new = (tmp_path / f"agent-python-{name}" for name in ("left", "used", "new"))
    for folder in (left, used, new):
        await asyncio.to_thread(folder.mkdir)
        os.utime(folder, (0, 0) if folder != new else None)
    with sandbox._in_use(str(used)):
        python_tool()
    assert sorted(os.listdir(tmp_path)) == [new.name, used.name]


async def test_the_tool_tells_what_code_prints() -> None:
    tool = python_tool()
    assert (await call(tool, code="6 * 7")).output == "42\n"
    assert (await call(tool, code="pass")).output == "It printed nothing."
    failed = await call(tool, code="1 / 0")
    assert failed.output.endswith("ZeroDivisionError: division by zero\n[exit status 1]")


async def test_a_cancelled_tool_leaves_no_process(started: list[psutil.Process]) -> None:
    task = asyncio.create_task(call(python_tool(), code="import time; time.sleep(1000)"))
    while not started:
        await asyncio.wait({task}, timeout=0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not started[0].is_running()


async def test_few_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait, so many agents do not take all of the memory."""
    monkeypatch.setattr(sandbox_policy, "AT_ONCE", 2)
    running = most = 0

    async def count(code: str) -> Finished:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return Finished(code, 0)

    monkeypatch.setattr(builtin_tools, "run_python", count)
    tool = python_tool()
    results = await asyncio.gather(*(call(tool, code=str(number)) for number in range(5)))
    assert [result.output for result in results] == ["0", "1", "2", "3", "4"]
    assert most == 2
