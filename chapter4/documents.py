"""A folder of text files that can be searched: BM25 over their sections, in memory.

Whoever may write into the folder is not trusted with the rest of the disk: links are not followed,
what is no plain file is passed over, and what is read is bounded. A document is opened by a name
that the folder was found to have, never by a path that somebody gives.
"""

import logging
import os
import re
import stat
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import bm25s

logger = logging.getLogger(__name__)

SUFFIXES = (".md", ".txt", ".rst")
MAX_FILES = 1000
MAX_FILE_BYTES = 2**20
MAX_BYTES = 32 * 2**20
PASSAGE_CHARACTERS = 1200
HEADING_CHARACTERS = 200  # of it before each piece of its section

_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True)
class Passage:
    """A part of the document `name`, which begins with its line `line`."""

    name: str
    line: int
    text: str


@dataclass(frozen=True)
class _File:
    """A document; it is read again when `state` (inode, size, time) is another one."""

    state: tuple[int, int, int]
    text: str


class Documents:
    """The files of a folder as they are now; reads again what has changed."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise NotADirectoryError(f"there is no folder {folder}")
        self._folder = folder.resolve()
        self._lock = threading.Lock()
        self._files: dict[str, _File] = {}
        self._passages: list[Passage] = []
        self._index: bm25s.BM25 | None = None

    def search(self, query: str, limit: int) -> list[Passage]:
        """The passages that fit best, the best one first."""
        with self._lock:
            self._refresh()
            words = _words(query)
            if self._index is None or not words:
                return []
            places, scores = self._index.retrieve(
                [words], k=min(limit, len(self._passages)), show_progress=False
            )
            return [
                self._passages[place]
                for place, score in zip(places[0], scores[0], strict=True)
                if score > 0
            ]

    def read(self, name: str) -> str:
        """A document's text.

        Raises:
            KeyError: there is none of this name.
        """
        with self._lock:
            self._refresh()
            return self._files[name].text

    def names(self) -> list[str]:
        with self._lock:
            self._refresh()
            return list(self._files)

    def _refresh(self) -> None:
        files = dict(_scan(self._folder, self._files))
        if files == self._files:
            return
        self._files = files
        self._passages = [
            passage for name, file in files.items() for passage in _split(name, file.text)
        ]
        words = [_words(f"{passage.name} {passage.text}") for passage in self._passages]
        self._index = None
        if any(words):
            self._index = bm25s.BM25()
            self._index.index(words, show_progress=False)


def _scan(folder: Path, known: Mapping[str, _File]) -> Iterator[tuple[str, _File]]:
    """The documents of a folder by name, within the limits; those that changed are read."""
    files = size = 0
    for place, folders, names, descriptor in os.fwalk(folder, follow_symlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.endswith(SUFFIXES) or name.startswith("."):
                continue
            if files == MAX_FILES or size >= MAX_BYTES:
                logger.warning("%s has more than is searched: %d files", folder, files)
                return
            path = str(Path(place, name).relative_to(folder))
            if (file := _read(name, descriptor, path, known.get(path))) is not None:
                yield path, file
                files += 1
                size += len(file.text)


def _read(name: str, folder: int, path: str, known: _File | None) -> _File | None:
    try:
        descriptor = os.open(name, _OPEN, dir_fd=folder)
    except OSError as error:  # a link, or gone, or not ours to read
        logger.warning("%s is passed over: %s", path, error.strerror)
        return None
    with os.fdopen(descriptor, "rb") as stream:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            logger.warning("%s is passed over: it is no plain file", path)
            return None
        state = (about.st_ino, about.st_size, about.st_mtime_ns)
        if known is not None and known.state == state:
            return known
        return _File(state, stream.read(MAX_FILE_BYTES).decode("utf-8", "replace"))


def _split(name: str, text: str) -> Iterator[Passage]:
    """Sections, which begin at headings; long ones in pieces, each with its heading."""
    heading, lines, size, first = "", list[str](), 0, 1

    def passage() -> Iterator[Passage]:
        body = "\n".join(lines).strip()
        if body and body != heading:
            yield Passage(name, first, body)

    for number, line in enumerate(text.splitlines(), start=1):
        begins = re.match(r"#{1,6} ", line) is not None
        if begins or size + len(line) > PASSAGE_CHARACTERS:
            yield from passage()
            heading = line.strip()[:HEADING_CHARACTERS] if begins else heading
            lines = [] if begins or not heading else [heading]
            size = sum(len(line) + 1 for line in lines)
            first = number
        lines.append(line[:PASSAGE_CHARACTERS])
        size += len(line) + 1
    yield from passage()


def _words(text: str) -> list[str]:
    """Lower case, without the plural's ending, so that "cities" finds "city"."""
    tokens = bm25s.tokenize(text, stopwords="en", return_ids=False, show_progress=False)[0]
    return [re.sub(r"(?<=\w\w)s$", "", re.sub(r"ies$", "y", word)) for word in tokens]
