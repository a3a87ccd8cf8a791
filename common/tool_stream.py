"""Calls of tools out of an answer's text, while it arrives.

The pieces in which it arrives make no difference to what the calls and the other text are.
"""

import json
import re
import secrets
from typing import Protocol

from common.protocol import PipelineError
from common.protocol_tools import ToolCallDelta
from common.tool_formats import ToolFormat, Tools
from common.tool_json import ValueEnd, is_json

_FENCE = re.compile(r"^ {0,3}(```|~~~)", re.MULTILINE)


class CallReader(Protocol):
    """Reads one answer. `calls` counts those that have begun; `done`: what follows is nothing."""

    calls: int
    done: bool

    def push(self, text: str, *, over: bool) -> tuple[str, list[ToolCallDelta]]:
        """What is certain to be text for the user, and pieces of calls; `over`: the last."""
        ...

    def undecided(self) -> int:
        """How many characters may be either."""
        ...


_NAMED = re.compile("call_n[0-9a-f]{24}")


def new_call(index: int, name: str, arguments: str = "", *, named: bool = False) -> ToolCallDelta:
    """The first piece of a call; the id looks like one of OpenAI's, and tells if it `is_named`."""
    kind = "call_n" if named else "call_"
    return ToolCallDelta(index, arguments, f"{kind}{secrets.token_hex(12)}", name)


def is_named(call_id: str) -> bool:
    """Whether it is the id of a `NamedCall`."""
    return _NAMED.fullmatch(call_id) is not None


class FreeCalls:
    """Calls that the model may make, in its own format, anywhere in its answer.

    A call is one when it is complete, is JSON, and is of a tool in `tools`; else it is text. So it
    is in a Markdown code block, or right after a backtick. Without `parallel` the first call ends
    the answer.
    """

    def __init__(self, format_: ToolFormat, tools: Tools, *, parallel: bool = True) -> None:
        self.calls = 0
        self.done = False
        self._format = format_
        self._tools = tools
        self._parallel = parallel
        self._open = re.compile("|".join(map(re.escape, format_.opens)))
        self._said = ""  # what is text
        self._gap: str | None = ""  # separators after the beginning, or a call; None: after text
        self._held = ""  # what may be either, after the gap
        self._waits = False  # for the end of what may be a call

    def push(self, text: str, *, over: bool) -> tuple[str, list[ToolCallDelta]]:
        if self.done:
            return "", []
        self._held += text
        if self._waits and not over and not any(end in text for end in "}]>"):
            return "", []
        before = len(self._said)
        calls: list[ToolCallDelta] = []
        while self._held and not self.done:
            self._widen_gap()
            start = self._next_start()
            if start is None:
                self._say(len(self._held) - (0 if over else self._beginning()))
                break
            self._say(start)
            if self._in_code():
                self._say(1)
                continue
            found = self._format.parse(self._held, self._tools, over)
            self._waits = found is None
            if found is None:
                break
            if not found.calls:
                self._say(found.end)
                continue
            for call in found.calls if self._parallel else found.calls[:1]:
                calls.append(new_call(self.calls, call.name, call.arguments))
                self.calls += 1
            self._held, self._gap = self._held[found.end :], ""
            self.done = not self._parallel
        if over and self._gap and not self.calls:
            self._said, self._gap = self._said + self._gap, None
        return self._said[before:], calls

    def undecided(self) -> int:
        return len(self._held) + len(self._gap or "")

    def _widen_gap(self) -> None:
        if self._gap is not None:
            rest = self._held.lstrip(self._format.separators)
            self._gap += self._held[: len(self._held) - len(rest)]
            self._held = rest

    def _next_start(self) -> int | None:
        """Where in what is held a call may begin."""
        if self._gap is not None and self._format.bare and self._held.startswith("{"):
            return 0
        found = self._open.search(self._held)
        return found.start() if found else None

    def _beginning(self) -> int:
        """How many of the last characters may begin a call with what comes next."""
        lengths = (
            length
            for opening in self._format.opens
            for length in range(len(opening) - 1, 0, -1)
            if self._held.endswith(opening[:length])
        )
        return max(lengths, default=0)

    def _say(self, length: int) -> None:
        """The first characters of what is held are text."""
        if length:
            self._said += (self._gap or "") + self._held[:length]
            self._gap, self._held = None, self._held[length:]

    def _in_code(self) -> bool:
        inline = self._gap is None and self._said.endswith("`")
        return inline or len(_FENCE.findall(self._said)) % 2 == 1


class NamedCall:
    """The one call of the tool `name` that the answer was forced to be: its text is arguments."""

    def __init__(self, name: str) -> None:
        self.calls = 0
        self.done = False
        self._name = name

    def push(self, text: str, *, over: bool) -> tuple[str, list[ToolCallDelta]]:
        if not text:
            return "", []
        if self.calls:
            return "", [ToolCallDelta(0, text)]
        self.calls = 1
        return "", [new_call(0, self._name, text, named=True)]

    def undecided(self) -> int:
        return 0


# What goes before the arguments: the end of another call, and this one's beginning.
_HEAD = re.compile(
    r'[\s\[\]},]*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)


class ForcedCalls:
    """The calls that the answer was forced to be, as `tool_grammar.calls_schema` wants them."""

    def __init__(self, tools: Tools) -> None:
        self.calls = 0
        self.done = False
        self._tools = tools
        self._held = ""
        self._arguments: ValueEnd | None = None  # of the call that has begun

    def push(self, text: str, *, over: bool) -> tuple[str, list[ToolCallDelta]]:
        self._held += text
        pieces: list[ToolCallDelta] = []
        while self._held:
            if self._arguments is None:
                head = _HEAD.match(self._held)
                if head is None:
                    break
                if not is_json(head[1]) or (name := json.loads(head[1])) not in self._tools:
                    raise PipelineError("internal", "The engine did not keep to the JSON schema.")
                pieces.append(new_call(self.calls, name))
                self.calls += 1
                self._held, self._arguments = self._held[head.end() :], ValueEnd()
            end = self._arguments.push(self._held)
            piece = self._held[:end]
            if pieces and pieces[-1].index == self.calls - 1:
                pieces[-1].arguments += piece
            else:
                pieces.append(ToolCallDelta(self.calls - 1, piece))
            self._held = self._held[len(piece) :]
            if end is not None:
                self._arguments = None
        return "", pieces

    def undecided(self) -> int:
        return 0
