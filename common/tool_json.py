"""Calls of tools as JSON in a text that a model wrote."""

import re

import msgspec


class NotJsonError(ValueError):
    """The text is not JSON, or not a call."""


class WrittenCall(msgspec.Struct, frozen=True):
    """A call as it was written: `arguments` is a JSON object's text."""

    name: str
    arguments: str

    def is_json(self) -> bool:
        return is_object(self.arguments)


class _Call(msgspec.Struct):
    name: str
    arguments: msgspec.Raw = msgspec.Raw()
    parameters: msgspec.Raw = msgspec.Raw()


_STRUCTURE = re.compile(r'\\.|[{}\[\]"]', re.DOTALL)


class ValueEnd:
    """Finds the end of an object or an array that arrives in pieces.

    Only brackets and strings are looked at: it may not be JSON.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def push(self, text: str, start: int = 0) -> int | None:
        """Where the value ends in `text`, from `start`; None: not yet."""
        if self._escaped and start < len(text):
            self._escaped, start = False, start + 1
        for found in _STRUCTURE.finditer(text, start):
            part = found[0]
            if part == '"':
                self._in_string = not self._in_string
            elif not self._in_string and part in "{[":
                self._depth += 1
            elif not self._in_string and part in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return found.end()
        backslashes = len(text) - max(start, len(text.rstrip("\\")))
        self._escaped = self._escaped or backslashes % 2 == 1
        return None


def value_end(text: str, start: int) -> int | None:
    """Where the object or array ends that begins at `start`; None if it does not."""
    return ValueEnd().push(text, start)


def calls_in(text: str) -> list[WrittenCall]:
    """The calls of `{"name": ..., "arguments": {...}}`, or of an array of such.

    The arguments may be under `parameters`, be left out, or be the text of the object.

    Raises:
        NotJsonError: this is something else.
    """
    try:
        read = msgspec.json.decode(text, type=list[_Call] | _Call)
        calls = [_written(call) for call in (read if isinstance(read, list) else [read])]
    except (msgspec.DecodeError, RecursionError, UnicodeEncodeError) as error:
        raise NotJsonError(str(error)) from error
    if not calls:
        raise NotJsonError("no call")
    return calls


def _written(call: _Call) -> WrittenCall:
    raw = bytes(call.arguments) or bytes(call.parameters) or b"{}"
    if raw.startswith(b'"'):
        raw = msgspec.json.decode(raw, type=str).encode()
    arguments = "{}" if raw == b"null" else raw.decode()
    if not is_object(arguments):
        raise NotJsonError("the arguments are not an object")
    return WrittenCall(call.name, arguments)


def is_object(text: str) -> bool:
    try:
        return isinstance(msgspec.json.decode(text), dict)
    except (msgspec.DecodeError, RecursionError, UnicodeEncodeError):
        return False


def is_json(text: str) -> bool:
    """Whether the text is JSON that can be sent on: without NaN, and without half characters."""
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeEncodeError):
        return False
    return True
