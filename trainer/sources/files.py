"""Text and .jsonl files as sources: a text file is one document, a .jsonl file holds one document per line.

A file is read in chunks. A file that changes during the run is an error, so that a sample never changes silently.
"""

import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

from trainer.errors import DataError
from trainer.sources.base import DocumentRef, Documents, InvalidRecord
from trainer.sources.columns import describe_utf8_error, extract_content, parse_document, parse_json_line
from trainer.sources.config import SourceConfig
from trainer.sources.content_cache import MIN_BYTES, contents
from trainer.sources.windows import split_chunks

MAX_LINE_BYTES = 1 << 28
MTIME_STEP_S = 0.02  # the clock of Linux file times advances in steps of at most 10 ms


class TextSource:
    """Text files. This source accepts every file."""

    def matches(self, path: Path, config: SourceConfig) -> bool:
        return True

    def open(self, path: Path, config: SourceConfig) -> Documents:
        if config.messages_column or config.domain_column or config.teacher_column:
            raise DataError(
                f"{path} has no columns: list text files in a separate [[data.sources]] without messages_column, "
                "domain_column and teacher_column"
            )
        return TextFile(path)


class JsonLinesSource:
    """.jsonl files."""

    def matches(self, path: Path, config: SourceConfig) -> bool:
        return path.suffix == ".jsonl"

    def open(self, path: Path, config: SourceConfig) -> Documents:
        return JsonLinesFile(path, config)


class StableFile:
    """A file that must not change after it was opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        with self._open() as file:
            self._size, self._mtime_ns = _stamp(file)
        if not self._size:
            raise DataError(f"{path} is empty: expected a file of at least one byte")
        # A write within the same step of the clock can leave size and time unchanged. Wait until the next write is
        # certain to change the time.
        if abs(time.time_ns() - self._mtime_ns) < MTIME_STEP_S * 1e9:
            time.sleep(MTIME_STEP_S)

    @property
    def identity(self) -> tuple[object, ...]:
        return (str(self.path.resolve()), self._size, self._mtime_ns)

    @contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        try:
            with open(self.path, "rb", opener=_open_without_waiting) as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise DataError(f"{self.path} is not a regular file")
                yield file
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror}") from error

    @contextmanager
    def open_unchanged(self) -> Iterator[BinaryIO]:
        """Open the file. Check before and after the block that the file is unchanged."""
        with self._open() as file:
            self._check_unchanged(file)
            yield file
            self._check_unchanged(file)

    def _check_unchanged(self, file: BinaryIO) -> None:
        size, mtime_ns = _stamp(file)
        if (size, mtime_ns) != (self._size, self._mtime_ns):
            expected, received = _describe_stamp(self._size, self._mtime_ns), _describe_stamp(size, mtime_ns)
            raise DataError(f"{self.path} has changed during the run: expected {expected}, found {received}")


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe that takes the place of the file would block for ever


def _stamp(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _describe_stamp(size: int, mtime_ns: int) -> str:
    return f"{size} bytes of {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(mtime_ns // 10**9))}"


class TextFile(StableFile):
    """A text file of any length as one document."""

    def scan(self) -> Iterator[DocumentRef | InvalidRecord]:
        yield DocumentRef(0, 0, 0, self._chunks())

    def _chunks(self) -> Iterator[bytes]:
        begin = 0
        with self.open_unchanged() as file:
            for chunk in split_chunks(file.read):
                try:
                    chunk.decode()
                except UnicodeDecodeError as error:
                    raise DataError(f"{self.path} is {describe_utf8_error(error, begin)}") from error
                yield chunk
                begin += len(chunk)

    def read(self, offset: int, length: int, begin: int, end: int) -> bytes:
        with self.open_unchanged() as file:
            file.seek(begin)
            return file.read(end - begin)


class JsonLinesFile(StableFile):
    """A .jsonl file with one document per line."""

    def __init__(self, path: Path, config: SourceConfig) -> None:
        super().__init__(path)
        self._config = config

    def scan(self) -> Iterator[DocumentRef | InvalidRecord]:
        offset = 0
        with self.open_unchanged() as file:
            for number, line in enumerate(self._lines(file), 1):
                if line.strip():
                    where, position = f"{self.path}, line {number}", (offset, len(line), number)
                    record = parse_document(where, position, partial(parse_json_line, line), self._config)
                    if record is not None:
                        yield record
                offset += len(line)

    def _lines(self, file: BinaryIO) -> Iterator[bytes]:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            if len(line) == MAX_LINE_BYTES:
                raise DataError(
                    f"{self.path}, line {number} is longer than {MAX_LINE_BYTES >> 20} MiB: a .jsonl file has one "
                    "document per line; store a text of this length in a text file"
                )
            yield line

    def read(self, offset: int, length: int, begin: int, end: int) -> bytes:
        with self.open_unchanged() as file:  # also where the content is kept: a changed file is an error

            def load() -> bytes:
                file.seek(offset)
                return extract_content(parse_json_line(file.read(length)), self._config).content

            content = load() if length < MIN_BYTES else contents.get((self, offset), load)
            return content[begin:end]
