"""The folder of documents: what is found in it, and what is not read."""

import os
import time
from pathlib import Path

from chapter4 import documents as module
from chapter4.builtin_tools import document_tools
from chapter4.documents import Documents
from tests.chapter4.tool_calls import call, named
from tests.project_files import ROOT

import pytest

SAMPLES = ROOT / "chapter4" / "documents"


def test_the_answer_is_in_the_samples() -> None:
    """`scripts/run chapter4 --ask` needs the largest city's population."""
    found = Documents(SAMPLES).search("population of the largest city in the notes", 3)
    assert found[0].name == "notes.md"
    assert "Harrowmere | 1,200,000" in found[0].text


def test_passages_are_sections_with_their_lines(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(
        "intro of ants\n# Bees\n\nhoney\n## Cats\nmilk\n# Empty\n# Dogs\nx"
    )
    documents = Documents(tmp_path)
    assert [(p.line, p.text) for p in documents.search("honey", 5)] == [(2, "# Bees\n\nhoney")]
    assert documents.search("cat", 5)[0].text == "## Cats\nmilk"
    assert documents.search("ants", 5)[0].line == 1
    assert documents.search("empty", 5) == []


def test_a_long_section_comes_in_pieces_with_its_heading(tmp_path: Path) -> None:
    lines = [f"line {number} {'word ' * 20}" for number in range(50)]
    lines[40] += "needle"
    (tmp_path / "a.md").write_text("# Long\n" + "\n".join(lines))
    (found,) = Documents(tmp_path).search("needle", 3)
    assert found.text.startswith("# Long\n")
    assert len(found.text) <= module.PASSAGE_CHARACTERS + 100
    assert found.line > 2


def test_blank_lines_take_no_time(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("\n" * (module.MAX_FILE_BYTES - 5) + "honey")
    began = time.thread_time()
    (found,) = Documents(tmp_path).search("honey", 3)
    assert time.thread_time() - began < 20
    assert found.text == "honey"


def test_a_long_heading_takes_no_memory(tmp_path: Path) -> None:
    """It is not repeated as a whole before each piece of its section."""
    half = module.MAX_FILE_BYTES // 2
    (tmp_path / "a.md").write_text(f"# {'x' * half}\n" + ("bee " * 250 + "\n") * (half // 1001))
    found = Documents(tmp_path).search("bee", 10_000)
    assert len(found) > half // 1001 // 2
    assert sum(len(passage.text) for passage in found) < 2 * half
    assert found[0].text.startswith("# xxx")


@pytest.mark.parametrize("query", ["", "the of and", "?!", "zzz", "x" * 10_000])
def test_a_query_without_a_match_finds_nothing(query: str) -> None:
    assert Documents(SAMPLES).search(query, 3) == []


def test_the_index_follows_the_folder(tmp_path: Path) -> None:
    documents = Documents(tmp_path)
    assert documents.search("honey", 3) == []
    (tmp_path / "a.md").write_text("honey of bees")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.txt").write_text("milk of cows")
    assert [p.name for p in documents.search("honey", 3)] == ["a.md"]
    assert [p.name for p in documents.search("milk", 3)] == ["deep/b.txt"]
    (tmp_path / "a.md").write_text("wax of bees, and more")
    assert documents.search("honey", 3) == []
    (tmp_path / "deep" / "b.txt").unlink()
    assert documents.search("milk", 3) == []
    assert documents.names() == ["a.md"]


def test_what_did_not_change_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.md").write_text("honey")
    documents = Documents(tmp_path)
    (passage,) = documents.search("honey", 3)
    monkeypatch.setattr("bm25s.BM25", None)
    assert documents.search("honey", 3)[0] is passage


def test_what_is_outside_is_not_read(tmp_path: Path) -> None:
    folder, outside = tmp_path / "documents", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (outside / "secret.md").write_text("secret honey")
    (folder / "link.md").symlink_to(outside / "secret.md")
    (folder / "passwd.txt").symlink_to("/etc/passwd")
    (folder / "inside").symlink_to(outside, target_is_directory=True)
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    os.mkfifo(folder / "pipe.md")
    (folder / ".hidden.md").write_text("honey")
    (folder / "program.py").write_text("honey")
    (folder / "own.md").write_text("honey")
    documents = Documents(folder)
    assert documents.names() == ["own.md"]
    assert [p.name for p in documents.search("secret honey root", 5)] == ["own.md"]


def test_the_folder_may_be_a_link_itself(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(SAMPLES, target_is_directory=True)
    assert "notes.md" in Documents(tmp_path / "link").names()


def test_what_is_read_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 10)
    monkeypatch.setattr(module, "MAX_BYTES", 35)
    for number in range(9):
        (tmp_path / f"{number}.md").write_text(f"word{number} " * 100)
    documents = Documents(tmp_path)
    assert documents.names() == ["0.md", "1.md", "2.md", "3.md"]
    assert documents.read("0.md") == "word0 word"
    monkeypatch.setattr(module, "MAX_FILES", 2)
    assert Documents(tmp_path).names() == ["0.md", "1.md"]


def test_bytes_that_are_no_text_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_bytes(b"\xff\xfe\x00 honey")
    assert Documents(tmp_path).search("honey", 1)[0].text == "\ufffd\ufffd\x00 honey"


def test_there_must_be_a_folder(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match="there is no folder"):
        Documents(tmp_path / "none")


async def test_the_tools_search_and_read() -> None:
    tools = document_tools(Documents(SAMPLES))
    found = await call(named(tools, "search_documents"), query="festival lantern", limit=1)
    assert found.output.startswith("[notes.md, from line 14]\n## Festivals\n")
    nothing = await call(named(tools, "search_documents"), query="zzz")
    assert nothing.output == "Nothing was found."
    read = named(tools, "read_document")
    assert (await call(read, name="trains.md")).output == Documents(SAMPLES).read("trains.md")


@pytest.mark.parametrize(
    "name", ["../README.md", "/etc/passwd", "./notes.md", "notes.md\0", "~/.ssh/id_rsa", ""]
)
async def test_a_document_is_read_by_a_name_of_the_folder_alone(name: str) -> None:
    result = await call(named(document_tools(Documents(SAMPLES)), "read_document"), name=name)
    assert result.output == ""
    assert result.error is not None
    assert result.error.startswith(f"there is no document {name!r}; there are letter.md, ")
