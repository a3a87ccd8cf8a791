"""What a README shows is what the reader gets: see `readme_blocks.py` for the convention."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

from launch.ports import is_free
from tests.project_files import ROOT, project_files
from tests.readme_blocks import Block, ReadmeError, Step, promise, read_blocks
from tests.readme_runner import END, Terminal, run_readme, run_step

import psutil
import pytest

DEFAULT_PORTS = (2379, 2380, 4222, 8000, 9100)

READMES = [str(path) for path in project_files() if path.name == "README.md"]


@cache
def isolation() -> list[str]:
    """The command that gives a program a network and processes of its own, [] if none may."""
    command = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if os.getuid() != 0:
        command += ["--user", "--map-root-user"]
    try:
        tried = subprocess.run([*command, "true"], capture_output=True)
    except FileNotFoundError:
        return []
    return command if tried.returncode == 0 else []


def missing_programs(blocks: list[Block], which: Callable[[str], str | None]) -> str:
    """What `blocks` use of the programs that a small machine may lack, and lacks."""
    commands = " ".join(step.command for block in blocks for step in block.steps)
    used = [name for name in ("curl",) if re.search(rf"\b{name}\b", commands)]
    return " ".join(name for name in used if which(name) is None)


def test_a_readme_that_needs_curl_is_not_run_without_it() -> None:
    blocks = read_blocks("```console\n$ true | curl localhost\n```")
    assert missing_programs(blocks, lambda name: None) == "curl"
    assert missing_programs(blocks, shutil.which) == ("" if shutil.which("curl") else "curl")
    assert not missing_programs(read_blocks("```console\n$ true\n```"), lambda name: None)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", READMES)
def test_the_commands_of_a_readme_print_what_it_promises(path: str) -> None:
    """Run in a network of its own, where the default ports that READMEs use are free."""
    blocks = read_blocks((ROOT / path).read_text())
    if not blocks:
        return
    if missing := missing_programs(blocks, shutil.which):
        pytest.skip(f"the README's commands need {missing}; get it with: apt install {missing}")
    busy = [port for port in DEFAULT_PORTS if not is_free(port)]
    if not isolation() and busy:
        pytest.skip(f"the README's commands need the ports {busy}; stop what listens there")
    environment = {
        name: value
        for name, value in os.environ.items()
        # `common` has set defaults in this process, which must not hide that a README lacks one.
        if not name.startswith(("DYN_", "ETCD_", "NATS_", "PYTEST_"))
    }
    result = subprocess.run(
        [
            *isolation(),
            *(sys.executable, "-m", "tests.readme_runner", ROOT / path),
            *(["--own-network"] if isolation() else []),
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def run_text(folder: Path, text: str) -> None:
    readme = folder / "README.md"
    readme.write_text(text)
    run_readme(readme)


@pytest.mark.parametrize(
    "block",
    [
        "```console\n$ echo hello\nhello\n```",
        "```console\n$ printf 'a\\nb\\nc 1 d\\n'\n…\nc … d\n```",
        "```console\n$ echo a; echo b\n…\n```",
        "```console numbers=vary\n$ echo 'took 17.5 ms'\ntook 3 ms\n```",
        "```console\n$ mkdir x\n$ cd x\n```\n```console\n$ basename $PWD\nx\n```",
        "```console\n$ echo one \\\n> two\none two\n```",
        "```console\n$ printf 'no newline'\nno newline\n```",
        # One program, as a shell that is between two of them would not stop.
        "```console terminal=2 background\n$ sh -c 'echo up; exec sleep 60'\nup\n```\n"
        "```console\n$ echo hi\nhi\n```\n"
        "```console terminal=2\n^C\n$ echo again\nagain\n```",
        "```console terminal=2 background\n"
        "$ sh -c 'mkfifo f; echo up; cat f; exec sleep 60'\nup\n```\n"
        "```console\n$ printf 'one\\ntwo\\nthree 3\\n' > f\n```\n"
        "```console terminal=2 continues\none\n```\n"
        "```console terminal=2 continues numbers=vary\n…\nthree 4\n```",
        "```sh norun: needs a GPU\n$ rm -rf /nothing\n```",
        "```python\nimport common\n```",
    ],
)
def test_a_readme_that_keeps_its_promise(tmp_path: Path, block: str) -> None:
    run_text(tmp_path, block)


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        ("```console\n$ echo hello\nHello\n```", r"(?s)promised:\nHello\nprinted:\nhello"),
        ("```console\n$ echo a; echo b\na\n```", r"(?s)promised:\na\nprinted:\na\nb"),
        ("```console\n$ echo a\na\nb\n```", "promised:"),
        ("```console\n$ echo 1\n2\n```", "promised:"),
        ("```console numbers=vary\n$ echo x1\ny1\n```", "promised:"),
        ("```console\n$ false\n```", "exit status 1"),
        (
            "```console background\n$ exit 3\nup\n```",
            "as promised",
        ),
        ("```console background\n$ echo dead\nalive\n```", "(?s)begin as promised.*dead"),
        ("```console\n^C\n```", "no command runs"),
        ("```console continues\nup\n```", "no command runs"),
        (
            "```console terminal=2 background\n$ echo up; echo more; sleep 2\nup\n```\n"
            "```console terminal=2 continues\nup\n```",
            "(?s)begin as promised; it is:\nmore",
        ),
        ("```console\nhello\n```", "begins with"),
        ("```console quietly\n$ true\n```", "unknown word 'quietly'"),
        ("```sh\ncurl localhost\n```", "line 1: commands that are not run"),
        ("text\n\n```bash\nls\n```", "line 3: commands that are not run"),
        ("```\ncurl localhost\n```", "commands that are not run"),
        ("text\n\n    $ python engine.py\n", "commands that are not run"),
        ("```sh norun\nls\n```", "norun needs a reason"),
    ],
)
def test_a_readme_that_breaks_its_promise(tmp_path: Path, block: str, problem: str) -> None:
    with pytest.raises(ReadmeError, match=problem):
        run_text(tmp_path, block)


def test_a_background_command_that_ends_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_until_it_has_ended(terminal: Terminal, block: Block, step: Step) -> None:
        run_step(terminal, block, step)
        terminal.wait_output(lambda output: END.search(output) is not None, 20)

    monkeypatch.setattr("tests.readme_runner.run_step", run_until_it_has_ended)
    with pytest.raises(ReadmeError, match=r"(?s)terminal 2 ended by itself:\nup"):
        run_text(tmp_path, "```console terminal=2 background\n$ echo up; true\nup\n```")


def test_nothing_that_a_readme_started_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stubborn background command does not survive a README, even one that fails."""
    text = (
        "```console terminal=2 background\n"
        "$ trap '' INT; echo $$ > pid; echo up; sleep 61\nup\n```\n"
        "```console\n$ false\n```"
    )
    monkeypatch.setattr("tests.readme_runner.STOP_TIMEOUT", 0.5)
    with pytest.raises(ReadmeError, match="exit status 1"):
        run_text(tmp_path, text)
    pid = int((tmp_path / "pid").read_text())
    assert not psutil.pid_exists(pid)
    assert not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "61"]]


def test_any_text_stays_within_its_line() -> None:
    assert promise(["a … b"]).fullmatch("a x b\n")
    assert not promise(["a … b"]).fullmatch("a\nb\n")
    assert promise(["a", "…", "b"]).fullmatch("a\nb\n")
    assert promise(["1.5 s"], numbers_vary=True).fullmatch("20 s\n")
    assert not promise(["a.b"]).fullmatch("axb\n")
