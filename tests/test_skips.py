"""`--no-skips`, with which `.ci/run` sees what the machine lacks."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TESTS = """
import pytest

@pytest.fixture
def browser():
    pytest.skip("apt install browser")

def test_fixture(browser):
    pass

def test_body():
    pytest.skip("apt install curl")

@pytest.mark.skipif(True, reason="apt install git")
def test_mark():
    pass

@pytest.mark.xfail(strict=True)
def test_expected_failure():
    assert False
"""


@pytest.mark.parametrize(
    ("options", "status", "summary"),
    [([], 0, "3 skipped, 1 xfailed"), (["--no-skips"], 1, "1 failed, 1 xfailed, 2 errors")],
)
def test_a_skip_is_a_failure_where_nothing_may_be_missing(
    tmp_path: Path, options: list[str], status: int, summary: str
) -> None:
    (tmp_path / "test_needs.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, "--rootdir", tmp_path, *options, tmp_path / "test_needs.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert summary in result.stdout
    assert result.returncode == status
    if options:
        for program in ("browser", "curl", "git"):
            assert f"this is a failure: Skipped: apt install {program}" in result.stdout
