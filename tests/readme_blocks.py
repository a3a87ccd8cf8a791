"""The commands and the promised output in a README.

A block that is run is marked `console`. A line that begins with `$ ` is a command (with `> `,
its continuation), a line `^C` interrupts the command that runs in that terminal, and the other
lines are the output that the reader is promised:

    ```console
    $ ./scripts/run chapter1 --ask "What is the capital of France?"
    …
    The capital of France is Paris.
    TTFT … ms · … tokens/s · … completion tokens · worker 0
    ```

`…` in a line stands for any text, a line `…` for any number of lines. Without promised lines
a command must only succeed. Words after `console`:

- `terminal=N`: the block is typed in another terminal; each keeps its folder and variables.
- `background`: the last command goes on running; its promised lines are the first it prints.
- `continues`: the block has no command; its lines are what the command that runs in that terminal
  prints after what was promised of it so far.
- `numbers=vary`: any number may stand where the README has a number.

Terminals begin in the README's folder, with the .venv activated. A block of another kind that
shows commands (`sh`, `bash`, `shell`, `console`, or one without a language) must say why it is
not run: `sh norun: needs a GPU`.
"""

import re
from dataclasses import dataclass, field

from markdown_it import MarkdownIt

SHELLS = {"sh", "bash", "shell", "zsh", "console", "shell-session", "terminal"}
COMMAND = re.compile(r"^\s*(?:[$#] |\./scripts/|(?:python3?|pip|curl|etcd|etcdctl|nats-server) )")
NUMBER = re.compile(r"\d+(?:\.\d+)?")


class ReadmeError(Exception):
    """A block that does not follow the convention, or output that is not as promised."""


@dataclass
class Step:
    """A command, `^C`, or "" for what runs already, and the lines that it is to print."""

    command: str
    promised: list[str] = field(default_factory=list)


@dataclass
class Block:
    """A fenced block that is run; `line` is that of its fence."""

    line: int
    terminal: str = "1"
    background: bool = False
    numbers_vary: bool = False
    steps: list[Step] = field(default_factory=list)


def read_blocks(text: str) -> list[Block]:
    """The blocks of a README to run, in order.

    Raises:
        ReadmeError: a block has an unknown word, or shows commands that nothing checks.
    """
    blocks = []
    for token in MarkdownIt().parse(text):
        if token.type not in ("fence", "code_block"):
            continue
        line = (token.map or [0])[0] + 1
        language, _, words = token.info.strip().partition(" ")
        if words.startswith("norun"):
            if not re.fullmatch(r"norun: \S.*", words):
                raise ReadmeError(f"line {line}: norun needs a reason: `norun: needs a GPU`")
        elif language == "console":
            blocks.append(_read_block(line, words.split(), token.content))
        elif language in SHELLS or (not language and _shows_commands(token.content)):
            raise ReadmeError(
                f"line {line}: commands that are not run; make it a `console` block or add "
                "`norun: REASON`"
            )
    return blocks


def _shows_commands(content: str) -> bool:
    return any(COMMAND.match(line) for line in content.splitlines())


def _read_block(line: int, words: list[str], content: str) -> Block:
    block = Block(line)
    for word in words:
        if match := re.fullmatch(r"terminal=(\w+)", word):
            block.terminal = match[1]
        elif word == "background":
            block.background = True
        elif word == "numbers=vary":
            block.numbers_vary = True
        elif word == "continues":
            block.steps.append(Step(""))
        else:
            raise ReadmeError(f"line {line}: unknown word {word!r} after `console`")
    continues = bool(block.steps)
    for text in content.splitlines():
        if continues:
            block.steps[0].promised.append(text)
        elif text.startswith("$ "):
            block.steps.append(Step(text.removeprefix("$ ")))
        elif text == "^C":
            block.steps.append(Step(text))
        elif not block.steps:
            raise ReadmeError(f"line {line}: a console block begins with `$ command` or ^C")
        elif text.startswith("> ") and not block.steps[-1].promised:
            block.steps[-1].command += "\n" + text.removeprefix("> ")
        else:
            block.steps[-1].promised.append(text)
    if not block.steps:
        raise ReadmeError(f"line {line}: the block has no command")
    return block


def promise(lines: list[str], *, numbers_vary: bool = False) -> "re.Pattern[str]":
    """What the output must match: all of it with `fullmatch`, its beginning with `match`."""
    pattern = ""
    for line in lines:
        if line.strip() == "…":
            pattern += r"(?:.*\n)*?"
            continue
        parts = [_literal(part, numbers_vary) for part in line.rstrip().split("…")]
        pattern += ".*?".join(parts) + r"[ \t]*\n"
    return re.compile(pattern)


def _literal(text: str, numbers_vary: bool) -> str:
    if not numbers_vary:
        return re.escape(text)
    return NUMBER.pattern.join(re.escape(part) for part in NUMBER.split(text))
