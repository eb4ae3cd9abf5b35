"""JSON lines as a table: one JSON object per line. Other formats are converted to JSON lines."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import islice
from typing import Any, BinaryIO

from trainer.errors import DataError
from trainer.sources.base import Table, TableRecord
from trainer.sources.data_file import DataFile
from trainer.sources.encoding import HEAD_BYTES, UTF8_MARK, describe_utf8_error, mark_length
from trainer.sources.record_formats.base import InvalidRecordError

MAX_LINE_BYTES = 1 << 28
MAX_EXAMINED_LINES, MAX_EXAMINED_BYTES = 100, 1 << 24  # the first lines, whose keys are the columns

Parse = Callable[[bytes], Mapping[str, Any]]


def parse_json_line(line: bytes) -> Mapping[str, Any]:
    """Parse one line. Raises InvalidRecordError if it is not a JSON object."""
    values = parse_json(line)
    if not isinstance(values, dict):
        raise InvalidRecordError(f"expected a JSON object, received {type(values).__name__}")
    return values


def parse_json(line: bytes) -> Any:
    """Parse a line of JSON. Raises InvalidRecordError."""
    try:
        text = line.removeprefix(UTF8_MARK).decode()
    except UnicodeDecodeError as error:
        raise InvalidRecordError(describe_utf8_error(error, 0)) from error
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRecordError(_syntax_error(text, error)) from error


def _syntax_error(text: str, error: Exception) -> str:
    """Describe a line that is not JSON, with the position of the error if the line begins as an object does."""
    begin = text[:40].strip()
    if begin.startswith("{") and isinstance(error, json.JSONDecodeError):
        reason = f"{error.msg} at character {error.pos + 1}"
        return f"expected a JSON object on one line, received {begin!r} ({reason})"
    return f"expected a JSON object, received {begin!r}"


class JsonLinesTable:
    """The lines of a file as records.

    unit   name of a record in messages: line, element or row
    parse  function that parses one line
    """

    def __init__(self, file: DataFile, unit: str = "line", parse: Parse = parse_json_line) -> None:
        self.name, self.where, self.unit = file.path.name, str(file.path), unit
        self._file = file
        self._parse = parse
        with file.open() as content:
            mark_length(content.read(HEAD_BYTES), file.path)

    @property
    def identity(self) -> tuple[object, ...]:
        return self._file.original.identity

    @cached_property
    def columns(self) -> Sequence[str]:
        return list(self._examples)

    @cached_property
    def _examples(self) -> Mapping[str, object]:
        """The first value of each key that is not null, of the first lines."""
        examples: dict[str, object] = {}
        for record in islice(self.scan(), MAX_EXAMINED_LINES):
            try:
                values = record.load()
            except InvalidRecordError:  # counted when the lines are indexed
                continue
            for key, value in values.items():
                examples[key] = value if examples.get(key) is None else examples[key]
            if record.offset > MAX_EXAMINED_BYTES:
                break
        return examples

    def example(self, column: str) -> object:
        return self._examples.get(column)

    def select(self, columns: Sequence[str]) -> Table:
        return self

    def scan(self) -> Iterator[TableRecord]:
        offset = 0
        with self._file.open() as file:
            for number, line in enumerate(self._lines(file), 1):
                if line.strip():
                    yield TableRecord(offset, len(line), number, partial(self._parse, line))
                offset += len(line)

    def _lines(self, file: BinaryIO) -> Iterator[bytes]:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            if len(line) == MAX_LINE_BYTES:
                raise DataError(
                    f"{self.where}, {self.unit} {number} is longer than {MAX_LINE_BYTES >> 20} MiB: each {self.unit} "
                    "is one document; store a text of this length in a text file"
                )
            yield line

    def load(self, offset: int, length: int) -> Mapping[str, Any]:
        with self._file.open() as file:
            file.seek(offset)
            return self._parse(file.read(length))

    def check(self) -> None:
        self._file.original.check()
