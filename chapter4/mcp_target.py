"""Which MCP server the operator means."""

import re
import shlex
from dataclasses import dataclass

# How OpenAI's functions may be named, and so are labels here.
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class McpTarget:
    """`label` is how requests name the server, which is a `command` to start or at a `url`."""

    label: str
    url: str | None = None
    command: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "McpTarget":
        """From `LABEL=COMMAND…` (words as in a shell) or `LABEL=URL`.

        Raises:
            ValueError: it is neither.
        """
        label, _, target = text.partition("=")
        if not NAME.fullmatch(label) or not target.strip():
            raise ValueError(f"{text!r} is not LABEL=COMMAND… or LABEL=URL")
        if target.startswith(("http://", "https://")):
            return cls(label, url=target.strip())
        try:
            return cls(label, command=tuple(shlex.split(target)))
        except ValueError as error:
            raise ValueError(f"{target!r} is no command: {error}") from error
