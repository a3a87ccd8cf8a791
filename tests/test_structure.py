"""The project's shape: who may import whom, chapters that copy forward, clean files."""

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.project_files import ROOT, project_files

import pytest

# What the code of each part may import from this project, besides itself.
ALLOWED_IMPORTS = {
    "chapter": {"common"},
    "common": set[str](),
    "launch": {"common"},
    "sdk": {"common"},
    "benchmarks": {"chapter", "common", "launch", "sdk"},
    "tests": {"benchmarks", "chapter", "common", "launch", "sdk"},
}
PRODUCT = ("chapter", "common", "launch", "sdk")

# Our own data path is the lesson: of Dynamo's LLM helpers we use those for routing alone.
ALLOWED_FROM_DYNAMO_LLM = re.compile(r"RadixTree|compute_block_hash_for_seq|\w+Publisher")
FORBIDDEN_NAMES = {"register_llm", "register_model", "HttpService", "HttpAsyncEngine"}

MAX_LINES = 250


def part_of(name: str) -> str:
    """The part of the project that a path or module belongs to; all chapters are one part."""
    top = re.split(r"[/.]", name, maxsplit=1)[0]
    return re.sub(r"^chapter\d+$", "chapter", top)


def imported_modules(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def wrong_imports(path: str, source: str) -> list[str]:
    """The imports in a file that its part of the project must not have."""
    own = path.split("/", maxsplit=1)[0]
    wrong = []
    for module in imported_modules(source):
        top = module.split(".", maxsplit=1)[0]
        if part_of(module) not in ALLOWED_IMPORTS or top == own:
            continue
        if part_of(module) not in ALLOWED_IMPORTS[part_of(path)]:
            wrong.append(module)
    return wrong


def forbidden_names(source: str) -> list[str]:
    """Uses of Dynamo's LLM helpers that the data path must not have."""
    found = [
        module
        for module in imported_modules(source)
        if module.startswith("dynamo.llm")
        and not ALLOWED_FROM_DYNAMO_LLM.fullmatch(module.removeprefix("dynamo.llm."))
    ]
    for node in ast.walk(ast.parse(source)):
        name = {ast.Name: "id", ast.Attribute: "attr"}.get(type(node))
        if name is not None and getattr(node, name) in FORBIDDEN_NAMES:
            found.append(getattr(node, name))
    return found


PYTHON_FILES = [str(path) for path in project_files() if path.suffix == ".py"]
IMPORTING_FILES = [path for path in PYTHON_FILES if part_of(path) in ALLOWED_IMPORTS]
PRODUCT_FILES = [path for path in PYTHON_FILES if part_of(path) in PRODUCT]


def test_there_are_files_to_check() -> None:
    assert {"common/protocol.py", "launch/launcher.py"} <= set(PRODUCT_FILES)


@pytest.mark.parametrize("git", ["missing", "not a checkout"])
def test_the_files_of_an_archive_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, git: str
) -> None:
    """A ZIP download is no git checkout, and a small machine has no git."""
    for name in (".ci/run", "common/kv.py", ".venv/lib/x.py", "common/__pycache__/x.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    if git == "missing":
        monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert project_files(tmp_path) == [Path(".ci/run"), Path("common/kv.py")]


@pytest.mark.parametrize("path", IMPORTING_FILES)
def test_imports_stay_within_the_allowed_parts(path: str) -> None:
    assert not wrong_imports(path, (ROOT / path).read_text())


@pytest.mark.parametrize("path", PRODUCT_FILES)
def test_the_data_path_is_our_own(path: str) -> None:
    assert not forbidden_names((ROOT / path).read_text())


@pytest.mark.parametrize("path", [*PRODUCT_FILES, "scripts/setup_venv.py"])
def test_files_are_short(path: str) -> None:
    lines = len((ROOT / path).read_text().splitlines())
    assert lines <= MAX_LINES, f"{path} has {lines} lines"


@pytest.mark.parametrize(
    ("path", "source", "wrong"),
    [
        ("chapter2/engine.py", "from chapter1.engine import main", ["chapter1.engine.main"]),
        ("chapter2/engine.py", "import common.kv, chapter2.policy, json", []),
        ("chapter2/engine.py", "def f():\n    import launch.ask", ["launch.ask"]),
        ("common/kv.py", "from benchmarks import load", ["benchmarks.load"]),
        ("common/kv.py", "import chapter1", ["chapter1"]),
        ("benchmarks/relay.py", "import tests.conftest", ["tests.conftest"]),
    ],
)
def test_the_check_finds_wrong_imports(path: str, source: str, wrong: list[str]) -> None:
    assert wrong_imports(path, source) == wrong


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from dynamo.llm import RadixTree, KvEventPublisher", []),
        ("from dynamo.llm import HttpService", ["dynamo.llm.HttpService"]),
        ("import dynamo.llm as llm", ["dynamo.llm"]),
        ("await runtime.register_llm()", ["register_llm"]),
    ],
)
def test_the_check_finds_forbidden_names(source: str, found: list[str]) -> None:
    assert forbidden_names(source) == found


def files_that_changed(readme: str) -> set[str]:
    """The names in backticks of a chapter README's section "Files that changed"."""
    section = re.search(r"^#+ Files that changed$(.*?)(?=^#|\Z)", readme, re.MULTILINE | re.DOTALL)
    return set(re.findall(r"`([\w./-]+)`", section[1])) if section else set()


def copy_problems(root: Path, number: int) -> list[str]:
    """How chapter `number` differs from its predecessor other than its README says."""

    def scripts(chapter: int) -> dict[str, str]:
        folder = root / f"chapter{chapter}"
        return {
            path.name: re.sub(rf"\b([Cc])hapter( ?){chapter}\b", r"\1hapter\2N", path.read_text())
            for path in folder.glob("*.py")
        }

    before, after = scripts(number - 1), scripts(number)
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    listed = files_that_changed((root / f"chapter{number}" / "README.md").read_text())
    return [
        *(f"{name} changed, but the README does not list it" for name in sorted(changed - listed)),
        *(f"{name} is listed, but did not change" for name in sorted(listed - changed)),
    ]


CHAPTERS = sorted(int(path.name.removeprefix("chapter")) for path in ROOT.glob("chapter[0-9]*"))


@pytest.mark.parametrize("number", [number for number in CHAPTERS if number > 1] or [None])
def test_a_chapter_copies_what_is_not_its_subject(number: int | None) -> None:
    if number is None:
        assert CHAPTERS == [1]
        return
    assert not copy_problems(ROOT, number)


def test_the_check_compares_chapters(tmp_path: Path) -> None:
    for number, engine, readme in (
        (1, "import common", ""),
        (2, "import common.kv", "# Chapter 2\n## Files that changed\n- `router.py`\n## Next\n"),
    ):
        folder = tmp_path / f"chapter{number}"
        folder.mkdir()
        (folder / "engine.py").write_text(f'"""Chapter {number}."""\n{engine}\n')
        (folder / "frontend.py").write_text(f"import chapter{number}.engine\n")
        (folder / "README.md").write_text(readme)
    assert copy_problems(tmp_path, 2) == [
        "engine.py changed, but the README does not list it",
        "router.py is listed, but did not change",
    ]
    (tmp_path / "chapter2" / "router.py").write_text("")
    (tmp_path / "chapter2" / "engine.py").write_text('"""Chapter 2."""\nimport common\n')
    assert copy_problems(tmp_path, 2) == []


# Built from pieces, so that this file does not have what it looks for.
REGISTRY = re.compile("|".join([r"pypi\." + "org", "python" + "hosted", r"npmjs\." + "org"]))
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:" + "|".join(["work", "root", r"home/\w+"]) + ")/")


def test_no_file_names_this_machine_or_a_package_registry() -> None:
    found = []
    for path in project_files():
        try:
            text = (ROOT / path).read_text()
        except UnicodeDecodeError:
            continue
        for pattern in (REGISTRY, MACHINE_PATH):
            found += [f"{path}: {match[0]}" for match in pattern.finditer(text)]
    assert not found


def test_constraints_are_plain_pins() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+]+", line)


def test_chapter_diff_names_the_chapters_that_exist() -> None:
    result = subprocess.run(
        [ROOT / "scripts" / "chapter_diff", "1", "99"], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert "there is no chapter99; there are: chapter1" in result.stderr


def test_chapter_diff_shows_the_lesson_alone(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "chapter_diff", tmp_path / "scripts")
    for number, line in ((1, "one"), (2, "two")):
        folder = tmp_path / f"chapter{number}"
        folder.mkdir()
        (folder / "engine.py").write_text(
            f'"""Chapter {number}."""\nimport chapter{number}\n# chapter {number}\n{line}\n'
        )
    (tmp_path / "chapter2" / "router.py").write_text("new\n")
    result = subprocess.run(
        [tmp_path / "scripts" / "chapter_diff", "1", "2"], capture_output=True, text=True
    )
    assert result.returncode == 0
    changes = [line for line in result.stdout.splitlines() if re.match(r"[-+](?![-+])", line)]
    assert changes == ["-one", "+two", "+new"]
