"""Types a README's commands into terminals and compares what they print.

    python -m tests.readme_runner README.md [--own-network]

`--own-network`: the process is alone in a new network namespace (see `test_readme.py`), where
the loopback interface is still down.
"""

import contextlib
import fcntl
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tests.readme_blocks import Block, ReadmeError, Step, promise, read_blocks

TIMEOUT = 120.0
STOP_TIMEOUT = 20.0

# What the shell prints after each command: a character that no program prints, and the status.
END = re.compile(r"\x1e(\d+)\n")


class Terminal:
    """A shell that is typed into; its output is read all the time."""

    def __init__(self, folder: Path) -> None:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._shell = subprocess.Popen(
            ["bash", "--norc", "--noprofile"],
            cwd=folder,
            env={**os.environ, "PATH": path, "NO_COLOR": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._output = ""
        self._begin = 0  # of the command's output, of which so much was promised:
        self._read_to = 0
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.running = False
        # Like an interactive shell, this one outlives a Ctrl-C of its command.
        self._write("trap : INT\n")

    def type(self, command: str) -> None:
        if self.running:
            raise ReadmeError(f"`{command}` is typed while another command runs in the terminal")
        self._begin, self._read_to = len(self._output), 0
        self.running = True
        self._write(f"{{ {command}\n}} </dev/null\nprintf '\\036%s\\n' $?\n")

    def interrupt(self) -> None:
        """Ctrl-C; what is printed from now on is the output."""
        if not self.running:
            raise ReadmeError("^C, but no command runs in the terminal")
        self._begin, self._read_to = len(self._output), 0
        os.killpg(self._shell.pid, signal.SIGINT)

    def wait_end(self) -> tuple[str, int]:
        """Output and status of the command, once it has ended."""
        output = self.wait_output(lambda output: END.search(output) is not None, TIMEOUT)
        end = END.search(output)
        if end is None:
            raise ReadmeError(f"did not end within {TIMEOUT:.0f} s; it printed:\n{output}")
        self.running = False
        text = output[: end.start()]
        return text + "\n" if text and not text.endswith("\n") else text, int(end[1])

    def wait_beginning(self, promised: "re.Pattern[str]") -> None:
        """Wait until the output of the running command goes on as promised; then it is read."""

        def enough(output: str) -> bool:
            return (
                promised.match(output, self._read_to) is not None or END.search(output) is not None
            )

        if not self.running:
            raise ReadmeError("no command runs in the terminal")
        output = self.wait_output(enough, TIMEOUT)
        read = promised.match(output, self._read_to)
        if read is None:
            raise ReadmeError(
                f"the output does not begin as promised; it is:\n{output[self._read_to :]}"
            )
        self._read_to = read.end()

    def has_ended(self) -> bool:
        return END.search(self._output, self._begin) is not None

    def close(self) -> None:
        """Ctrl-C for what runs, then the end of everything in the terminal."""
        if self.running and not self.has_ended() and self._shell.poll() is None:
            self.interrupt()
            self.wait_output(lambda output: END.search(output) is not None, STOP_TIMEOUT)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._shell.pid, signal.SIGKILL)
        self._shell.wait()
        self._reader.join(STOP_TIMEOUT)
        for pipe in (self._shell.stdin, self._shell.stdout):
            if pipe is not None:
                pipe.close()

    def wait_output(self, enough: Callable[[str], bool], timeout: float) -> str:
        """The output of the command, once it is `enough`, the shell ended or the time is over."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while not enough(output := self._output[self._begin :]):
                left = deadline - time.monotonic()
                if left <= 0 or self._shell.poll() is not None:
                    break
                self._changed.wait(min(left, 1.0))
        return output

    def _write(self, text: str) -> None:
        assert self._shell.stdin is not None
        self._shell.stdin.write(text.encode())
        self._shell.stdin.flush()

    def _read(self) -> None:
        assert self._shell.stdout is not None
        while data := os.read(self._shell.stdout.fileno(), 65536):
            with self._changed:
                self._output += data.decode(errors="replace")
                self._changed.notify_all()


def run_readme(readme: Path) -> None:
    """Run a README's blocks in order.

    Raises:
        ReadmeError: with the line, the command, and how its output differs.
    """
    terminals: dict[str, Terminal] = {}
    try:
        for block in read_blocks(readme.read_text()):
            terminal = terminals.get(block.terminal)
            if terminal is None:
                terminal = terminals[block.terminal] = Terminal(readme.resolve().parent)
            for step in block.steps:
                try:
                    run_step(terminal, block, step)
                except ReadmeError as error:
                    raise ReadmeError(
                        f"{readme.name}, block at line {block.line}: $ {step.command}\n{error}"
                    ) from error
            for name, other in terminals.items():
                if other.running and other.has_ended():
                    raise ReadmeError(
                        f"{readme.name}: the command in terminal {name} ended by itself:\n"
                        f"{other.wait_end()[0]}"
                    )
    finally:
        for terminal in reversed(terminals.values()):
            terminal.close()


def run_step(terminal: Terminal, block: Block, step: Step) -> None:
    promised = promise(step.promised, numbers_vary=block.numbers_vary)
    if step.command == "^C":
        terminal.interrupt()
    elif step.command:
        terminal.type(step.command)
    if not step.command or (block.background and step is block.steps[-1]):
        terminal.wait_beginning(promised)
        return
    output, status = terminal.wait_end()
    if status != 0 and step.command != "^C":
        raise ReadmeError(f"exit status {status}; it printed:\n{output}")
    if step.promised and promised.fullmatch(output.rstrip("\n") + "\n") is None:
        expected = "\n".join(step.promised)
        raise ReadmeError(f"promised:\n{expected}\nprinted:\n{output}")


def bring_loopback_up() -> None:
    """Do `ip link set lo up`, which needs a package that small machines lack."""
    get_flags, set_flags, up = 0x8913, 0x8914, 0x1  # SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sH14x", b"lo", 0)
        flags = struct.unpack("16sH14x", fcntl.ioctl(any_socket, get_flags, request))[1]
        fcntl.ioctl(any_socket, set_flags, struct.pack("16sH14x", b"lo", flags | up))


if __name__ == "__main__":
    if "--own-network" in sys.argv[2:]:
        bring_loopback_up()
    try:
        run_readme(Path(sys.argv[1]))
    except ReadmeError as error:
        sys.exit(str(error))
