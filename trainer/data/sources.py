"""What documents are in a source: found one after another, and read again by where they stand.

A text file is one document, each line of a .jsonl file is one, each row of a table is one (tables.py). No file is read
whole, and one that changes while a run goes on is an error, never another text.
"""

import io
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from trainer.config import SourceConfig
from trainer.data.columns import BrokenError, content_of, not_utf8, parsed
from trainer.data.windows import stretches
from trainer.errors import DataError

LONGEST_LINE_BYTES = 1 << 28
TICK_S = 0.02  # Linux stamps files by a clock that moves in steps of at most 10 ms


class Broken(NamedTuple):
    """A line or row that cannot be read, as one sentence that names it."""

    sentence: str


class Found(NamedTuple):
    """A document where it stands, in stretches that belong together.

    place   the byte where its line begins, or its row
    length  the bytes of its line; 0 where it has no line
    number  of its line or row, counted from 1; 0 where it has the file for itself
    """

    place: int
    length: int
    number: int
    stretches: Iterable[bytes]
    domain: str | None = None
    teacher: str | None = None


class Documents(Protocol):
    """The documents of one file or table. Raises DataError, naming it, where it cannot be read or has changed."""

    @property
    def name(self) -> str:
        """How its samples are called, and their domain where nothing else says one."""

    @property
    def identity(self) -> tuple[object, ...]:
        """What is another whenever the documents may be others."""

    def scan(self) -> Iterator[Found | Broken]:
        """All documents that say something, in their order."""

    def read(self, place: int, length: int, begin: int, end: int) -> bytes:
        """The bytes begin … end of the content of one that was found; any thread may ask."""


def judged(
    where: str, span: tuple[int, int, int], values: Callable[[], Mapping[str, Any]], columns: SourceConfig
) -> Iterator[Found | Broken]:
    """The document of a line or row, its place, length and number in `span`; nothing for one that says nothing."""
    try:
        said = content_of(values(), columns)
    except BrokenError as error:
        yield Broken(f"{where}: {error}")
        return
    parts = [said.content] if columns.messages_column else stretches(io.BytesIO(said.content).read)
    if said.content:
        yield Found(*span, parts, said.domain, said.teacher)


def open_file(path: Path, columns: SourceConfig) -> Documents:
    """A text or .jsonl file, not yet read. Raises DataError if it cannot be."""
    if path.suffix == ".jsonl":
        return JsonLines(path, columns)
    if columns.messages_column or columns.domain_column or columns.teacher_column:
        raise DataError(f"{path} has no columns: give text files a [[data.sources]] of their own")
    return TextFile(path)


class _File:
    """A file that must stay as it was when it was opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        with self._opened() as file:
            self._size, self._mtime_ns = _stamp(file)
        if not self._size:
            raise DataError(f"{path} is empty: give a text of at least one byte")
        if abs(time.time_ns() - self._mtime_ns) < TICK_S * 1e9:
            time.sleep(TICK_S)  # from here on, what is written has another time

    @property
    def identity(self) -> tuple[object, ...]:
        return (str(self.path.resolve()), self._size, self._mtime_ns)

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        try:
            with self.path.open("rb") as file:
                yield file
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror}") from error

    @contextmanager
    def _unchanged(self) -> Iterator[BinaryIO]:
        """Open, and the same before and after what is done with it."""
        with self._opened() as file:
            self._check(file)
            yield file
            self._check(file)

    def _check(self, file: BinaryIO) -> None:
        size, mtime_ns = _stamp(file)
        if (size, mtime_ns) != (self._size, self._mtime_ns):
            was, now = _seen(self._size, self._mtime_ns), _seen(size, mtime_ns)
            raise DataError(f"{self.path} has changed while the run goes on: expected {was}, found {now}")


def _stamp(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _seen(size: int, mtime_ns: int) -> str:
    return f"{size} bytes of {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(mtime_ns // 10**9))}"


class TextFile(_File):
    """One document, whatever its length."""

    def scan(self) -> Iterator[Found | Broken]:
        yield Found(0, 0, 0, self._stretches())

    def _stretches(self) -> Iterator[bytes]:
        begin = 0
        with self._unchanged() as file:
            for stretch in stretches(file.read):
                try:
                    stretch.decode()
                except UnicodeDecodeError as error:
                    raise DataError(f"{self.path} is {not_utf8(error, begin)}") from error
                yield stretch
                begin += len(stretch)

    def read(self, place: int, length: int, begin: int, end: int) -> bytes:
        with self._unchanged() as file:
            file.seek(begin)
            return file.read(end - begin)


class JsonLines(_File):
    """A document a line."""

    def __init__(self, path: Path, columns: SourceConfig) -> None:
        super().__init__(path)
        self._columns = columns

    def scan(self) -> Iterator[Found | Broken]:
        place = 0
        with self._unchanged() as file:
            for number, line in enumerate(self._lines(file), 1):
                if line.strip():
                    where, span = f"{self.path}, line {number}", (place, len(line), number)
                    yield from judged(where, span, partial(parsed, line), self._columns)
                place += len(line)

    def _lines(self, file: BinaryIO) -> Iterator[bytes]:
        number = 0
        while line := file.readline(LONGEST_LINE_BYTES):
            number += 1
            if len(line) == LONGEST_LINE_BYTES:
                raise DataError(
                    f"{self.path}, line {number} is longer than {LONGEST_LINE_BYTES >> 20} MiB: .jsonl has a document "
                    "a line; a text as long as this is a file of its own"
                )
            yield line

    def read(self, place: int, length: int, begin: int, end: int) -> bytes:
        with self._unchanged() as file:
            file.seek(place)
            line = file.read(length)
        return content_of(parsed(line), self._columns).content[begin:end]
