"""Policies by name and from files."""

import os
import time
from pathlib import Path

import chapter3.policies
from chapter3.policy_loader import DEFAULT_POLICY, POLICIES, load_policy
from chapter3.scoring import scored
from tests.chapter3.fleet import snapshot, view

import pytest

TWO = snapshot(view(0), view(1, overlap_blocks=2))


def write(path: Path, body: str) -> str:
    path.write_text(body)
    return f"{path}:mine"


def totals(name: str) -> list[float]:
    return [score.total for score in scored(load_policy(name), TWO)]


@pytest.mark.parametrize("name", POLICIES)
def test_every_named_policy_scores_every_worker(name: str) -> None:
    assert len(totals(name)) == 2


def test_every_file_of_policies_has_a_name() -> None:
    folder = Path(chapter3.policies.__file__).parent
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert modules == set(POLICIES.values())
    assert DEFAULT_POLICY in POLICIES


def test_a_function_of_a_file(tmp_path: Path) -> None:
    name = write(
        tmp_path / "some.py", "def mine(at):\n    return [w.overlap_blocks for w in at.workers]\n"
    )
    assert totals(name) == [0.0, 2.0]


def test_a_path_is_relative_to_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "some.py", "def mine(at):\n    return [1, 2]\n")
    monkeypatch.chdir(tmp_path)
    assert totals("some.py:mine") == [1.0, 2.0]
    assert totals("./some.py:mine") == [1.0, 2.0]


def test_a_path_may_have_colons_and_spaces(tmp_path: Path) -> None:
    folder = tmp_path / "a: b"
    folder.mkdir()
    assert totals(write(folder / "c:d.py", "mine = lambda at: [3, 4]\n")) == [3.0, 4.0]


def test_a_file_is_read_anew_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    """Also within a second, with a file of the same size, as an editor leaves it."""
    path, second = tmp_path / "some.py", int(time.time())
    for value in (1, 2, 3):
        name = write(path, f"def mine(at):\n    return [{value}, 0]\n")
        os.utime(path, (second, second))
        assert totals(name)[0] == value
    assert [found.name for found in tmp_path.iterdir()] == ["some.py"]


def test_a_file_may_have_dataclasses_state_and_any_name(tmp_path: Path) -> None:
    """`random.py` is a likely name for one that imports `random`."""
    name = write(
        tmp_path / "random.py",
        "from __future__ import annotations\n"
        "import random\n"
        "from dataclasses import dataclass, field\n"
        "@dataclass\n"
        "class State:\n"
        "    seen: int = 0\n"
        "    rng: random.Random = field(default_factory=lambda: random.Random(1))\n"
        "STATE = State()\n"
        "def mine(at):\n"
        "    STATE.seen += 1\n"
        "    return [STATE.seen for _ in at.workers]\n",
    )
    policy = load_policy(name)
    assert [scored(policy, TWO)[0].total for _ in range(3)] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def other(at): ...\n", "has no function 'mine'"),
        ("mine = 3\n", "has no function 'mine'"),
        ("def mine(at:\n", "cannot be run: SyntaxError"),
        ("import no_such_module\n", "cannot be run: ModuleNotFoundError"),
        ("1 / 0\n", "cannot be run: ZeroDivisionError"),
        ("import sys\nsys.exit(3)\n", "cannot be run: SystemExit(3)"),
        ("async def mine(at):\n    return [0, 0]\n", "is async; a policy is a plain function"),
    ],
)
def test_a_file_that_has_no_policy_is_refused(tmp_path: Path, body: str, message: str) -> None:
    name = write(tmp_path / "some.py", body)
    with pytest.raises(ValueError, match=r"some\.py") as raised:
        load_policy(name)
    assert message in str(raised.value)


@pytest.mark.parametrize("name", ["", "magic", "kv ", "KV", "some.py", "some.txt:mine", ":mine"])
def test_an_unknown_name_is_told_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match="there is no policy") as raised:
        load_policy(name)
    assert repr(name) in str(raised.value)
    assert "give path.py:function or one of dynamo, " in str(raised.value)


def test_a_missing_file_and_a_folder_are_told(tmp_path: Path) -> None:
    (tmp_path / "folder.py").mkdir()
    for name in ("missing.py", "folder.py"):
        with pytest.raises(ValueError, match=f"there is no file .*{name}"):
            load_policy(f"{tmp_path / name}:mine")
