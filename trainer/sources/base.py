"""Protocols of data sources: a Source opens a file or dataset, and Documents yield its documents.

A document is either one text or one chat. Its content is bytes: the UTF-8 of the text, or the JSON of
[messages, tools]. Documents are scanned once, when their windows are indexed; afterwards, any part of a document is
read by its position. No file is held in memory as a whole.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import NamedTuple, Protocol

from trainer.sources import SOURCES
from trainer.sources.config import SourceConfig


class InvalidRecord(NamedTuple):
    """A line or row that cannot be read. `message` names the file, the line or row, and the reason."""

    message: str


class DocumentRef(NamedTuple):
    """The position of one document, and its content in chunks of bytes.

    offset   byte offset of the document's line, or index of its row
    length   number of bytes of its line; 0 for a document without a line
    number   number of its line or row, counted from 1; 0 if the document is a whole file
    chunks   consecutive parts of the content, each valid UTF-8; can be iterated once
    domain   value of the domain column; None without a column
    teacher  value of the teacher column; None without a column
    """

    offset: int
    length: int
    number: int
    chunks: Iterable[bytes]
    domain: str | None = None
    teacher: str | None = None


class Documents(Protocol):
    """The documents of one file or dataset.

    Every method raises DataError, with the path, if the file cannot be read or has changed since it was opened.
    """

    @property
    def name(self) -> str:
        """Prefix of the names of its samples; also their domain, unless a column or the config gives one."""

    @property
    def identity(self) -> tuple[object, ...]:
        """Values, serializable as JSON, that change whenever the documents may have changed."""

    def scan(self) -> Iterator[DocumentRef | InvalidRecord]:
        """Yield every document with content, in order, and every record that cannot be read."""

    def read(self, offset: int, length: int, begin: int, end: int) -> bytes:
        """Return the bytes [begin, end) of the content of the document at (offset, length). Thread-safe."""


class Source(Protocol):
    """A data format: recognizes its files or datasets and opens them.

    `path` is a file; for a dataset it is the name of the dataset as a path. A source is created without arguments.
    """

    def matches(self, path: Path, config: SourceConfig) -> bool:
        """Return whether this source opens the path. Does not read the file."""

    def open(self, path: Path, config: SourceConfig) -> Documents:
        """Open the path without reading its documents. Raises DataError if that is not possible."""


def open_documents(path: Path, config: SourceConfig) -> Documents:
    """Open a file or dataset by the first source of the registry that matches it."""
    for target in SOURCES.values():
        source: Source = resolve_name(target)()
        if source.matches(path, config):
            return source.open(path, config)
    raise AssertionError("the text source matches every path")
