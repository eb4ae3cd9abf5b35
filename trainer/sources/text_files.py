"""Text files as sources: a file is one document, read in chunks."""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from trainer.errors import DataError
from trainer.sources.base import DocumentRef, Documents, FormatInfo, InvalidRecord
from trainer.sources.config import SourceConfig
from trainer.sources.data_file import DataFile, open_data_file
from trainer.sources.encoding import HEAD_BYTES, mark_length, not_utf8
from trainer.sources.windows import split_chunks

COLUMN_KEYS = ("record_format", "text_column", "messages_column", "template", "domain_column", "teacher_column")


class TextSource:
    """Text files: one document each."""

    suffixes: ClassVar[tuple[str, ...]] = (".txt", ".md")

    def open(self, path: Path, config: SourceConfig) -> Documents:
        if keys := [key for key in COLUMN_KEYS if getattr(config, key) is not None]:
            raise DataError(
                f"{path} is a text and has no columns: list text files in a separate [[data.sources]] without "
                f"{', '.join(keys)}"
            )
        return TextFile(path)


class TextFile:
    """A text file of any length as one document."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self.format = FormatInfo("texts: whole files")
        self._file: DataFile = open_data_file(path)
        with self._file.open() as file:
            self._begin = mark_length(file.read(HEAD_BYTES), path)

    @property
    def identity(self) -> tuple[object, ...]:
        return self._file.original.identity

    def scan(self) -> Iterator[DocumentRef | InvalidRecord]:
        yield DocumentRef(0, 0, 0, self._chunks())

    def _chunks(self) -> Iterator[bytes]:
        begin = self._begin
        with self._file.open() as file:
            file.seek(begin)
            for chunk in split_chunks(file.read):
                try:
                    chunk.decode()
                except UnicodeDecodeError as error:
                    raise DataError(not_utf8(error, begin, self._file.path)) from error
                yield chunk
                begin += len(chunk)

    def read(self, offset: int, length: int, begin: int, end: int) -> bytes:
        with self._file.open() as file:
            file.seek(self._begin + begin)
            return file.read(end - begin)
