"""`chapter1/call.py` as a person types it; its output is checked with the README's."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("arguments", [[], ["What", "is", "this?"]])
def test_without_its_question_call_tells_its_usage(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "chapter1.call", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == "usage: python call.py QUESTION\n"
