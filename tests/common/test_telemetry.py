"""What a client sends cannot forge a log line."""

import io
import logging

from common.telemetry import request_log, setup_logging

import pytest


@pytest.mark.parametrize("character", ["\n", "\r", "\x1b", "\x85", "\u2028"])
def test_control_characters_are_escaped(character: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    root = logging.getLogger()
    before = root.handlers.copy(), root.level
    try:
        setup_logging("engine-0", "info", json=False)
        request_log("id-1").warning("refused: %s", f"bad{character}12:00:00.000 INFO forged")
    finally:
        root.handlers[:], root.level = before
    lines = stderr.getvalue().splitlines()
    assert len(lines) == 1
    assert lines[0].endswith(f"bad\\u{ord(character):04x}12:00:00.000 INFO forged [id-1]")
