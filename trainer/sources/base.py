"""Protocols of data sources: a Source opens a file or dataset, and Documents yield its documents.

A document is one text, one text with a masked prompt, or one chat. Its content is bytes: the UTF-8 of the text, or the
JSON of [messages, tools]. Documents are scanned once, when their windows are indexed; afterwards, any part of a
document is read by its position. No file is held in memory as a whole.

A Table holds records with named columns. trainer/sources/table_documents.py makes documents of it by a record format.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from trainer.sources.config import SourceConfig


class InvalidRecord(NamedTuple):
    """A line or row that cannot be read. `message` names the file, the line or row, and the reason."""

    message: str


class EmptyRecord(NamedTuple):
    """A line or row with an empty text or an empty chat. It is counted and not used."""


class DocumentRef(NamedTuple):
    """The position of one document, and its content in chunks of bytes.

    offset        byte offset of the document's line, or index of its row
    length        number of bytes of its line; 0 for a document without a line
    number        number of its line or row, counted from 1; 0 if the document is a whole file
    chunks        consecutive parts of the content, each valid UTF-8; can be iterated once
    domain        value of the domain column; None without a column
    teacher       value of the teacher column; None without a column
    prompt_bytes  number of leading bytes of the content that are a masked prompt
    """

    offset: int
    length: int
    number: int
    chunks: Iterable[bytes]
    domain: str | None = None
    teacher: str | None = None
    prompt_bytes: int = 0


class FormatInfo(NamedTuple):
    """The record format of one file or dataset.

    description  kind of the documents and their columns
    is_chat      whether the documents are chats
    is_whole     whether each document is one window: chats, and texts with a masked prompt
    """

    description: str
    is_chat: bool = False
    is_whole: bool = False


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

    @property
    def format(self) -> FormatInfo:
        """The record format."""

    def scan(self) -> Iterator[DocumentRef | InvalidRecord | EmptyRecord]:
        """Yield every document, in order, and every record that is empty or cannot be read."""

    def read(self, offset: int, length: int, begin: int, end: int) -> bytes:
        """Return the bytes [begin, end) of the content of the document at (offset, length). Thread-safe."""


class TableRecord(NamedTuple):
    """The position of one record of a table, as in DocumentRef.

    load  returns the values by column. Raises InvalidRecordError if the record cannot be read
    """

    offset: int
    length: int
    number: int
    load: Callable[[], Mapping[str, Any]]


class Table(Protocol):
    """Records with named columns: the rows of a table, or the lines of a file. Errors as in Documents.

    name   prefix of the names of its samples
    where  the path or name in errors
    unit   what a record is called: line, element or row
    """

    name: str
    where: str
    unit: str

    @property
    def columns(self) -> Sequence[str]:
        """Names of the columns. For a file of JSON objects, the keys of the first objects."""

    @property
    def identity(self) -> tuple[object, ...]:
        """Values, serializable as JSON, that change whenever the records may have changed."""

    def example(self, column: str) -> object:
        """Return the first value of a column, among the first records, that is not null; None without one."""

    def select(self, columns: Sequence[str]) -> "Table":
        """Return the table reduced to these columns. A format that cannot skip columns may keep the others."""

    def scan(self) -> Iterator[TableRecord]:
        """Yield every record."""

    def load(self, offset: int, length: int) -> Mapping[str, Any]:
        """Return the values of the record at (offset, length). Raises InvalidRecordError. Thread-safe."""

    def check(self) -> None:
        """Raise DataError if the file has changed since it was opened."""


class Source(Protocol):
    """A format of files or datasets. A source is created without arguments.

    suffixes  suffixes of its files, in lower case and without that of a compression
    """

    suffixes: ClassVar[tuple[str, ...]]

    def open(self, path: Path, config: SourceConfig) -> Documents:
        """Open a file, or the dataset whose name is the path. Raises DataError if that is not possible."""
