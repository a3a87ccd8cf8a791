"""The launcher as a person uses it: questions, Ctrl-C, crashes, busy ports, wrong servers."""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from common.model_files import DEFAULT_MODEL
from launch.chapters import CHAPTERS
from launch.ports import LOOPBACK, free_port

import httpx
import psutil
import pytest

STATS = re.compile(
    r"TTFT \d+ ms · \d+\.\d tokens/s · \d+ prompt \+ \d+ completion tokens · worker (\d+)"
)
QUESTION = "What is the capital of France?"


def user_environment() -> dict[str, str]:
    """The environment without the defaults that `common` has set in this process."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("DYN_", "ETCD_", "NATS_"))
    }


class Launcher:
    """A running launcher, what it printed, and what it must not leave behind."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        self.folder = folder
        self.stdout_file = folder / "stdout"
        self.stderr_file = folder / "stderr"
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        with self.stdout_file.open("w") as stdout, self.stderr_file.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "launch", *arguments],
                env={**user_environment(), "TMPDIR": str(self.temporary), **environment},
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        self.children: set[psutil.Process] = set()

    @property
    def stdout(self) -> str:
        return self.stdout_file.read_text()

    @property
    def stderr(self) -> str:
        return self.stderr_file.read_text()

    def wait_for(self, condition: Callable[[], bool], timeout: float = 60) -> None:
        deadline = time.monotonic() + timeout
        while True:
            running = self.process.poll() is None  # before: its last output counts
            if condition():
                break
            assert running, self.stdout + self.stderr
            assert time.monotonic() < deadline, self.stdout + self.stderr
            time.sleep(0.01)
        if running:
            self.children.update(psutil.Process(self.process.pid).children(recursive=True))

    def wait_until_ready(self) -> str:
        """Wait until it serves; its URL."""
        self.wait_for(lambda: "Ctrl-C stops everything." in self.stdout)
        url = re.search(r"OpenAI API: (http://\S+)/v1", self.stdout)
        assert url
        return url[1]

    def child(self, text: str) -> psutil.Process:
        """The child that has `text` in its command line."""
        (found,) = (
            child for child in self.children if any(text in part for part in child.cmdline())
        )
        return found

    def wait(self, timeout: float = 60) -> int:
        return self.process.wait(timeout)

    def check_nothing_left(self) -> None:
        _, alive = psutil.wait_procs(self.children, timeout=30)
        assert not alive
        leftover = list(self.temporary.iterdir())
        assert not leftover


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name: sockets in it have at most 107 bytes for theirs."""
    with tempfile.TemporaryDirectory(prefix="launch-") as name:
        yield Path(name)


@contextmanager
def launched(folder: Path, *arguments: str, **environment: str) -> Iterator[Launcher]:
    """A launcher in a folder of its own; killed in the end, and its children with it."""
    launcher = Launcher(folder, *arguments, **environment)
    try:
        yield launcher
    finally:
        launcher.process.kill()
        launcher.process.wait()


SIMULATED = ("chapter1", "--backend", "simulated")


def test_asks_and_stops(folder: Path) -> None:
    with launched(folder, *SIMULATED, "--ask", QUESTION) as launcher:
        launcher.wait_for(lambda: "starting engine0" in launcher.stderr)
        assert launcher.wait() == 0, launcher.stderr
        answer, stats = launcher.stdout.rstrip("\n").rsplit("\n", 1)
        assert answer
        match = STATS.fullmatch(stats)
        assert match, stats
        assert match[1] == "0"
        assert "|" not in launcher.stderr, "logs stay hidden while asking"
        assert "simulated" in launcher.stderr
        launcher.check_nothing_left()


def test_nobody_reads_the_answer(folder: Path) -> None:
    """`scripts/run … | head -c 1` ends quietly, and everything with it."""
    command = [sys.executable, "-m", "launch", *SIMULATED, "--ask", QUESTION]
    environment = {**user_environment(), "TMPDIR": str(folder)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        messages = process.stderr.read()
    assert process.returncode == 1
    assert "ready in" in messages
    assert "Traceback" not in messages
    assert "BrokenPipe" not in messages
    assert not list(folder.iterdir())


def test_nobody_reads_the_logs(folder: Path) -> None:
    """`scripts/run … 2>&1 | head` must not hang when it is to stop."""
    command = [sys.executable, "-m", "launch", *SIMULATED, "--verbose"]
    environment = {**user_environment(), "TMPDIR": str(folder)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stderr.close()
        while "Ctrl-C" not in process.stdout.readline():
            pass
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
    assert not list(folder.iterdir())


def test_the_real_model_knows_the_capital_of_france(folder: Path) -> None:
    with launched(folder, "chapter1", "--ask", QUESTION) as launcher:
        assert launcher.wait() == 0, launcher.stderr
        assert "Paris" in launcher.stdout
        assert STATS.search(launcher.stdout)


def test_several_questions_and_engines(folder: Path) -> None:
    asks = [argument for text in ("one", "two", "three") for argument in ("--ask", text)]
    with launched(folder, *SIMULATED, "--engines", "2", *asks, "--verbose") as launcher:
        assert launcher.wait() == 0, launcher.stderr
        assert re.findall(r"^> (.*)$", launcher.stdout, re.MULTILINE) == ["one", "two", "three"]
        assert len(STATS.findall(launcher.stdout)) == 3
        assert "   engine1 | " in launcher.stderr
        assert "starting engine0, engine1, processor, frontend" in launcher.stderr


def test_a_router_has_two_engines_and_the_policy_of_the_command_line(folder: Path) -> None:
    arguments = ["--backend", "simulated", "--policy", "round_robin", "--verbose"]
    arguments += [argument for text in ("one", "two", "three") for argument in ("--ask", text)]
    with launched(folder, "chapter2", *arguments) as launcher:
        launcher.wait_for(lambda: "starting engine0" in launcher.stderr)
        assert launcher.wait() == 0, launcher.stderr
        assert "starting engine0, engine1, router, processor, frontend" in launcher.stderr
        assert "policy round_robin" in launcher.stderr
        assert STATS.findall(launcher.stdout) in (["0", "1", "0"], ["1", "0", "1"])
        launcher.check_nothing_left()


def test_chapter_3_has_four_simulated_engines_and_takes_a_policy_from_a_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(
        "def last(snapshot):\n    return [worker.worker_id for worker in snapshot.workers]\n"
    )
    monkeypatch.chdir(tmp_path)
    arguments = ["--policy", "mine.py:last", "--shadow", "dynamo", "--ask", "one", "--verbose"]
    with launched(folder, "chapter3", *arguments) as launcher:
        launcher.wait_for(lambda: "starting engine0" in launcher.stderr)
        assert launcher.wait() == 0, launcher.stderr
        assert "starting engine0, engine1, engine2, engine3, router, " in launcher.stderr
        assert "(simulated: the words mean nothing)" in launcher.stderr
        assert f"policy {tmp_path}/mine.py:last, in its shadow dynamo" in launcher.stderr
        assert STATS.findall(launcher.stdout) == ["3"]
        launcher.check_nothing_left()


def test_chapter_3_goes_on_without_an_engine_that_is_killed(folder: Path) -> None:
    """Until none is left: that is what its lesson is about."""
    with launched(folder, "chapter3", "--engines", "2") as launcher:
        url = launcher.wait_until_ready()
        engines = {
            child.cmdline()[-1]: child
            for child in launcher.children
            if "chapter3.engine" in child.cmdline()
        }
        engines["1"].kill()
        launcher.wait_for(
            lambda: "engine1 has ended with status -9; the others go on" in launcher.stderr
        )
        chat = {
            "model": DEFAULT_MODEL,
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 2,
        }
        assert httpx.post(f"{url}/v1/chat/completions", json=chat, timeout=30).status_code == 200
        engines["0"].kill()
        assert launcher.wait() == 1
        assert "error: engine0 was killed by SIGKILL; its last lines:" in launcher.stderr
        launcher.check_nothing_left()


@pytest.mark.parametrize(
    ("chapter", "number", "tiers"),
    [
        ("chapter1", signal.SIGINT, ["frontend", "processor", "engine0"]),
        ("chapter2", signal.SIGTERM, ["frontend", "processor", "router", "engine0"]),
    ],
)
def test_serves_until_a_signal(
    folder: Path, chapter: str, number: signal.Signals, tiers: list[str]
) -> None:
    """On the port that it was told; then each component stops before those that it calls."""
    port = free_port()
    arguments = ("--backend", "simulated", "--engines", "1", "--port", str(port))
    with launched(folder, chapter, *arguments) as launcher:
        url = launcher.wait_until_ready()
        assert url == f"http://{LOOPBACK}:{port}"
        assert httpx.get(f"{url}/v1/models", timeout=30).status_code == 200
        assert httpx.get(f"{url}/", timeout=30).status_code == 200
        launcher.process.send_signal(number)
        assert launcher.wait() == 0, launcher.stderr
        assert "warning" not in launcher.stderr
        assert re.findall(r"(\w+) \| .*draining", launcher.stderr) == tiers
        assert "\033" not in launcher.stderr, "no colours in a file"
        launcher.check_nothing_left()


def test_ctrl_c_before_the_answer(folder: Path) -> None:
    for_ever = "prefill_tokens_per_s=1"
    with launched(folder, *SIMULATED, "--ask", QUESTION, ENGINE_ARGS=for_ever) as launcher:
        launcher.wait_for(lambda: "starting engine0" in launcher.stderr)
        launcher.process.send_signal(signal.SIGINT)
        assert launcher.wait() == 128 + signal.SIGINT
        assert "Traceback" not in launcher.stderr
        launcher.check_nothing_left()


def test_ctrl_c_twice_kills(folder: Path) -> None:
    with launched(folder, *SIMULATED) as launcher:
        launcher.wait_until_ready()
        # A component that does not react: the orderly stop would wait for it.
        launcher.child("chapter1.frontend").suspend()
        launcher.process.send_signal(signal.SIGINT)
        launcher.wait_for(lambda: "stopping" in launcher.stderr)
        launcher.process.send_signal(signal.SIGINT)
        assert launcher.wait(timeout=30) == 128 + signal.SIGINT
        launcher.check_nothing_left()


@pytest.mark.parametrize(
    ("chapter", "name"),
    [
        ("chapter1", "nats-server"),
        ("chapter1", "etcd"),
        ("chapter1", "chapter1.engine"),
        ("chapter1", "chapter1.frontend"),
        ("chapter2", "chapter2.router"),
    ],
)
def test_a_crash_of_any_child_stops_everything(folder: Path, chapter: str, name: str) -> None:
    with launched(folder, chapter, "--backend", "simulated") as launcher:
        launcher.wait_until_ready()
        launcher.child(name).kill()
        assert launcher.wait() == 1
        assert re.search(r"error: \w+ was killed by SIGKILL; its last lines:", launcher.stderr)
        launcher.check_nothing_left()


def test_a_crash_while_starting_shows_the_last_lines(folder: Path) -> None:
    """Python itself crashes: the interpreter that the launcher starts finds a broken module."""
    (folder / "uvloop.py").write_text('raise RuntimeError("broken installation")\n')
    with launched(folder, "chapter1", "--ask", QUESTION, PYTHONPATH=str(folder)) as launcher:
        assert launcher.wait() == 1
        assert re.search(
            r"error: \w+ exited with status 1; its last lines:\n(?s:.*)"
            r"RuntimeError: broken installation",
            launcher.stderr,
        )
        launcher.check_nothing_left()


def test_wrong_settings_of_the_environment(folder: Path) -> None:
    with launched(folder, *SIMULATED, DYN_NAMESPACE="my space") as launcher:
        assert launcher.wait() == 2
        assert "--namespace: 'my space' is not of letters" in launcher.stderr
        assert "Traceback" not in launcher.stderr


def test_the_log_cannot_be_written(folder: Path) -> None:
    """Standard error on a full disk: it serves all the same, and stops."""
    command = [sys.executable, "-m", "launch", *SIMULATED, "--verbose"]
    environment = {**user_environment(), "TMPDIR": str(folder)}
    with (
        open("/dev/full", "w") as full,
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=full, text=True
        ) as process,
    ):
        assert process.stdout is not None
        assert "Chat page" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        # The flush at its exit fails too, which Python answers with status 120.
        assert process.wait(timeout=30) in (0, 120)
    assert not list(folder.iterdir())


def test_ctrl_c_at_once(folder: Path) -> None:
    """While its own modules are still being imported, of which httpx takes the longest."""
    (folder / "httpx.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    )
    with launched(folder, *SIMULATED, PYTHONPATH=str(folder)) as launcher:
        assert launcher.wait(timeout=30) == -signal.SIGINT
        assert not launcher.stderr


def test_an_answer_on_an_ascii_terminal(folder: Path) -> None:
    arguments = (*SIMULATED, "--ask", "eins · zwei", "--ask", "three")
    with launched(folder, *arguments, PYTHONIOENCODING="ascii") as launcher:
        assert launcher.wait() == 0, launcher.stderr
        assert "> eins ? zwei\n" in launcher.stdout
        assert "tokens/s ? " in launcher.stdout


def test_kill_9_of_the_launcher_leaves_nothing(folder: Path) -> None:
    with launched(folder, *SIMULATED) as launcher:
        launcher.wait_until_ready()
        launcher.process.kill()
        launcher.wait()
        launcher.check_nothing_left()


def test_busy_default_ports_lead_to_free_ones(folder: Path) -> None:
    """A foreign program listens on every default port, this test's own or another one."""
    with ExitStack() as stack:
        for port in (4222, 2379, 8000):
            with suppress(OSError):  # another program listens there already
                stack.enter_context(socket.create_server((LOOPBACK, port)))
        launcher = stack.enter_context(launched(folder, *SIMULATED))
        url = launcher.wait_until_ready()
        assert not url.endswith(":8000")
        assert "port 4222 is taken, so NATS gets a free one" in launcher.stderr
        assert "port 2379 is taken, so etcd gets a free one" in launcher.stderr
        assert httpx.get(f"{url}/v1/models", timeout=30).status_code == 200


def test_an_explicit_port_that_is_taken(folder: Path) -> None:
    with socket.create_server((LOOPBACK, 0)) as listener:
        port = str(listener.getsockname()[1])
        with launched(folder, *SIMULATED, "--port", port) as launcher:
            assert launcher.wait() == 1
            assert f"error: --port {port}: another program listens there" in launcher.stderr
            launcher.check_nothing_left()


def test_servers_of_the_environment_are_used(
    folder: Path, servers: dict[str, str], namespace: str
) -> None:
    arguments = (*SIMULATED, "--namespace", namespace, "--ask", QUESTION)
    addresses = {name: url.partition("://")[2] for name, url in servers.items()}
    with launched(folder, *arguments, **addresses) as launcher:
        launcher.wait_for(lambda: "starting engine0" in launcher.stderr)
        commands = [" ".join(child.cmdline()) for child in launcher.children]
        assert not [command for command in commands if "nats-server" in command]
        assert launcher.wait() == 0, launcher.stderr
        assert STATS.search(launcher.stdout)


@pytest.mark.parametrize("variable", ["NATS_SERVER", "ETCD_ENDPOINTS"])
def test_a_server_of_the_environment_that_does_not_answer(folder: Path, variable: str) -> None:
    scheme = {"NATS_SERVER": "nats", "ETCD_ENDPOINTS": "http"}[variable]
    address = f"{LOOPBACK}:{free_port()}"
    with launched(folder, *SIMULATED, **{variable: address}) as launcher:
        assert launcher.wait() == 1
        assert f"error: {variable}={scheme}://{address}: " in launcher.stderr
        launcher.check_nothing_left()


def test_what_is_no_address_of_a_server(folder: Path) -> None:
    addresses = "nats://one:4222,nats://two:4222"
    with launched(folder, *SIMULATED, NATS_SERVER=addresses) as launcher:
        assert launcher.wait() == 1
        assert f"error: NATS_SERVER={addresses} is not like nats://" in launcher.stderr
        launcher.check_nothing_left()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["chapter99"], 1, f"the chapters are: {', '.join(CHAPTERS)}"),
        (["chapter1", "--model", "/no/such.gguf"], 1, "--model: model '/no/such.gguf' is neither"),
        (["chapter1", "--engines", "0"], 2, "--engines: '0' is not a whole number of at least 1"),
        (["chapter1", "--port", "65536"], 2, "--port: '65536' is not a port number"),
        (["chapter1", "--port", "99999"], 2, "--port: '99999' is not a port number (1 to 65535)"),
        (["chapter1", "--namespace", "a.b"], 2, "--namespace: 'a.b' is not of letters, digits"),
        (["chapter1", "--backend", "magic"], 2, "'llamacpp', 'simulated'"),
        (["chapter2", "--policy", "magic"], 2, "'kv', 'least_loaded', 'round_robin', 'random'"),
        (["chapter1", "--policy", "kv"], 1, "--policy: chapter1 has no router"),
        (["chapter2", "--routers", "2"], 1, "--routers: chapter2 has at most one"),
        (["chapter2", "--prefill", "1"], 1, "--prefill: the engines of chapter2 do all of"),
        (["chapter3", "--prefill", "4"], 1, "--prefill 4: of 4 engines one at least must"),
        (["chapter3", "--prefill", "1", "--backend", "sglang"], 1, "--prefill: all engines get"),
        (["chapter3", "--routers", "0"], 2, "'0' is not a whole number of at least 1"),
        (["chapter2", "--policy", "dynamo"], 2, "--policy: 'dynamo' is none of 'kv', "),
        (["chapter2", "--policy", "x.py:f"], 2, "--policy: 'x.py:f' is none of 'kv', "),
        (["chapter2", "--shadow", "magic"], 1, "--shadow: chapter2 has no router with a second"),
        (["chapter3", "--policy", "magic"], 2, "--policy: 'magic' is none of 'dynamo', "),
        (["chapter3", "--shadow", "magic"], 2, "'session_affinity' or FILE.py:FUNCTION"),
        (["chapter3", "--policy", "gone.py:f"], 2, "--policy: there is no file gone.py"),
        (["chapter3", "--real", "0"], 2, "--real: '0' is not a whole number of at least 1"),
        (["chapter3", "--real", "2", "--engines", "2"], 2, "--real 2 and --engines contradict"),
        (["chapter1", "--real", "2", "--backend", "simulated"], 2, "--backend simulated contrad"),
    ],
)
def test_wrong_arguments(folder: Path, arguments: list[str], status: int, message: str) -> None:
    with launched(folder, *arguments) as launcher:
        assert launcher.wait() == status
        assert message in launcher.stderr.replace("\n", " ")
        assert "Traceback" not in launcher.stderr
        launcher.check_nothing_left()
