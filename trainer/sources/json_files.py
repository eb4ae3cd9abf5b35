"""JSON files as sources: one object per line, or an array of objects, which is converted to lines."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from trainer.errors import DataError
from trainer.sources.base import Documents
from trainer.sources.compression import split_suffix
from trainer.sources.config import SourceConfig
from trainer.sources.data_file import Chunks, open_data_file, read_head
from trainer.sources.encoding import decoded, mark_length
from trainer.sources.json_lines import MAX_LINE_BYTES, JsonLinesTable
from trainer.sources.table_documents import TableDocuments

_SPACES = re.compile(r"[ \t\n\r]*")
_OF_NUMBERS = "0123456789+-.eE"
_MAX_LITERAL = 16  # characters; no number prefix, literal or escape that may be cut off is longer before its error


class JsonSource:
    """JSON files: one object per line, or an array of objects."""

    suffixes: ClassVar[tuple[str, ...]] = (".jsonl", ".ndjson", ".json")

    def open(self, path: Path, config: SourceConfig) -> Documents:
        head = read_head(path)
        head = head[mark_length(head, path) :].lstrip()
        if head.startswith(b"["):
            return TableDocuments(JsonLinesTable(open_data_file(path, array_to_lines), "element"), config)
        if split_suffix(path)[0] == ".json":
            _check_first_line(head, path)
        return TableDocuments(JsonLinesTable(open_data_file(path)), config)


def _check_first_line(head: bytes, path: Path) -> None:
    """Raise DataError if a .json file contains one object on several lines instead of lines or an array."""
    line, line_end, _ = head.partition(b"\n")
    try:
        is_object = not line_end or isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        is_object = False
    if not is_object:
        raise DataError(
            f"{path} is neither an array of JSON objects nor one JSON object per line: its first line is "
            f"{line[:40].decode(errors='replace')!r}"
        )


def array_to_lines(chunks: Chunks, path: Path) -> Chunks:
    """Convert a JSON array to lines, one for each element. Raises DataError if it is not a JSON array."""
    for element in _ArrayReader(decoded(chunks, path), path).elements():
        # A line break in JSON text is never part of a value.
        yield element.replace("\n", " ").replace("\r", " ").encode() + b"\n"


class _ArrayReader:
    """Reads the elements of one array from a stream of text, of which it holds one element and one chunk."""

    def __init__(self, chunks: Iterator[str], path: Path) -> None:
        self._chunks = chunks
        self._path = path
        self._text = ""
        self._at = 0
        self._is_complete = False  # the text contains the end of the file
        self._number = 0
        self._decoder = json.JSONDecoder()

    def elements(self) -> Iterator[str]:
        """Yield the JSON text of every element."""
        self._next_character()
        self._at += 1  # the bracket
        closing = self._next_character() == "]"
        while not closing:
            self._number += 1
            yield self._element()
            separator = self._next_character()
            if separator not in (",", "]"):
                raise self._error(f"expected a comma or the end of the array, received {separator!r}")
            self._at += 1
            closing = separator == "]"
        self._at += not self._number  # the bracket of an empty array
        if rest := self._next_character():
            raise self._error(f"expected the end of the file after the array, received {rest!r}")
        if not self._number:
            raise DataError(f"{self._path} is an empty array: expected at least one element")

    def _element(self) -> str:
        self._next_character()
        while True:
            try:
                _, end = self._decoder.raw_decode(self._text, self._at)
                rest = self._text[end : end + _MAX_LITERAL]
                may_continue = len(rest) < _MAX_LITERAL and not rest.strip(_OF_NUMBERS)  # a cut 1.5e3 is the number 1
                if not may_continue or self._is_complete:
                    element, self._at = self._text[self._at : end], end
                    return element
            except json.JSONDecodeError as error:
                is_cut = error.pos >= len(self._text) - _MAX_LITERAL or error.msg.startswith("Unterminated string")
                if self._is_complete or not is_cut:
                    raise self._error(f"not JSON: {error.msg}") from error
            except (ValueError, RecursionError) as error:  # an integer of thousands of digits; nested too deeply
                raise self._error("not JSON that can be read: a number or the nesting is too large") from error
            if len(self._text) - self._at > MAX_LINE_BYTES:
                raise self._error(f"longer than {MAX_LINE_BYTES >> 20} MiB")
            self._fill()

    def _next_character(self) -> str:
        """Skip white space, and return the next character without consuming it; "" at the end of the file."""
        while True:
            spaces = _SPACES.match(self._text, self._at)
            assert spaces is not None
            self._at = spaces.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if self._is_complete:
                return ""
            self._fill()

    def _fill(self) -> None:
        """Read at least one chunk, and as many characters as are buffered, so that long elements need few attempts."""
        parts = [self._text[self._at :]]
        self._at, wanted = 0, len(parts[0])
        while not self._is_complete:
            part = next(self._chunks, None)
            self._is_complete = part is None
            parts.append(part or "")
            wanted -= len(part or "")
            if wanted <= 0 and part:
                break
        self._text = "".join(parts)

    def _error(self, reason: str) -> DataError:
        return DataError(f"{self._path}, element {max(self._number, 1)}: {reason}")
