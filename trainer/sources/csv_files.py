"""CSV and TSV files as sources. The first row has the names of the columns; values stay strings.

Columns without a name, which spreadsheets export beside a table, are left out.

Rows may contain line breaks, so that a file is converted to JSON lines. A line is an object, or a list of two numbers
for a row with too many values: the number of columns, and the number of values.
"""

import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from trainer.errors import DataError
from trainer.sources.base import Documents
from trainer.sources.config import SourceConfig
from trainer.sources.data_file import Chunks, open_data_file
from trainer.sources.encoding import decoded
from trainer.sources.json_lines import MAX_LINE_BYTES, JsonLinesTable, parse_json
from trainer.sources.record_formats.base import InvalidRecordError
from trainer.sources.table_documents import TableDocuments

MAX_NAME_CHARS = 255
_DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}


class CsvSource:
    """CSV files: comma-separated values, with the names of the columns in the first row."""

    suffixes: ClassVar[tuple[str, ...]] = (".csv",)

    def open(self, path: Path, config: SourceConfig) -> Documents:
        return TableDocuments(JsonLinesTable(open_data_file(path, csv_to_lines), "row", parse_row), config)


class TsvSource:
    """TSV files: tab-separated values, with the names of the columns in the first row."""

    suffixes: ClassVar[tuple[str, ...]] = (".tsv",)

    def open(self, path: Path, config: SourceConfig) -> Documents:
        return TableDocuments(JsonLinesTable(open_data_file(path, tsv_to_lines), "row", parse_row), config)


def csv_to_lines(chunks: Chunks, path: Path) -> Chunks:
    """Convert comma-separated values to JSON lines. Raises DataError."""
    return _to_lines(chunks, path, ",")


def tsv_to_lines(chunks: Chunks, path: Path) -> Chunks:
    """Convert tab-separated values to JSON lines. Raises DataError."""
    return _to_lines(chunks, path, "\t")


def parse_row(line: bytes) -> Mapping[str, Any]:
    """Parse one converted row. Raises InvalidRecordError if it has more values than columns."""
    values = parse_json(line)
    if isinstance(values, list):
        raise InvalidRecordError(f"expected {values[0]} values as in the first row, received {values[1]}")
    columns: Mapping[str, Any] = values
    return columns


def _to_lines(chunks: Chunks, path: Path, delimiter: str) -> Chunks:
    csv.field_size_limit(MAX_LINE_BYTES)  # of the whole process; the default of 128 KiB is less than a long text
    rows = csv.reader(_lines(decoded(chunks, path), path), delimiter=delimiter, strict=True)
    header: list[str] = []
    num_rows = 0
    try:
        for row in rows:
            if row and not header:
                header = _checked_header(row, path, delimiter)
            elif row:
                num_rows += 1
                yield _line(header, row)
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.line_num}: {_reason(error)}") from error
    if not num_rows:
        raise DataError(f"{path} has no row after the names of its columns")


def _reason(error: csv.Error) -> str:
    if "new-line character" in str(error):  # its text gives advice about the code
        return (
            "a carriage return without a line feed, expected lines that end with a line feed: convert the file, for "
            r"example with `tr '\r' '\n'`"
        )
    return str(error)


def _checked_header(row: list[str], path: Path, delimiter: str) -> list[str]:
    """Return the names of the columns, which every line repeats; "" for a column without a name.

    Raises DataError if two names are equal, one is long, no column has one, or another delimiter separates the names.
    """
    row = [name if name.strip() else "" for name in row]
    if not any(row):
        raise DataError(f"{path}: its first row, which names the columns, has no name")
    if (longest := max(map(len, row))) > MAX_NAME_CHARS:
        raise DataError(
            f"{path}: its first row, which names the columns, has a name of {longest} characters, expected at most "
            f"{MAX_NAME_CHARS}"
        )
    if len(row) == 1 and (other := next((char for char in _DELIMITERS if char in row[0]), None)):
        raise DataError(
            f"{path}: its first row, which names the columns, has one name, {row[0][:40]!r}: expected names separated "
            f"by {_DELIMITERS[delimiter]}, received {_DELIMITERS[other]}: convert the file, or set file_format = "
            '"csv" for commas or "tsv" for tabs in its source'
        )
    name, count = Counter(filter(None, row)).most_common(1)[0]
    if count > 1:
        raise DataError(f"{path}: its first row, which names the columns, has {name[:40]!r} more than once")
    return row


def _line(header: list[str], row: list[str]) -> bytes:
    is_long = len(row) > len(header)  # columns that a short row lacks are missing
    named = {name: value for name, value in zip(header, row, strict=False) if name}
    values: object = [len(header), len(row)] if is_long else named
    return json.dumps(values, ensure_ascii=False).encode() + b"\n"


def _lines(chunks: Iterator[str], path: Path) -> Iterator[str]:
    """Split a stream of text at line feeds, which stay at the ends. Raises DataError for a line that is too long."""
    rest: list[str] = []
    number, rest_chars = 1, 0
    for chunk in chunks:
        *complete, last = chunk.split("\n")
        for line in complete:
            yield "".join([*rest, line, "\n"])
            number, rest, rest_chars = number + 1, [], 0
        rest.append(last)
        rest_chars += len(last)
        if rest_chars > MAX_LINE_BYTES:
            raise DataError(
                f"{path}, line {number} is longer than {MAX_LINE_BYTES >> 20} MiB: end every row with a line feed, or "
                "store a text of this length in a text file"
            )
    if any(rest):
        yield "".join(rest)
