"""Data files as they are read: the user's file itself, or its converted copy in the cache.

A compressed file and a format without random access are converted once, into a plain file or JSON lines. Samples and
errors name the user's file, and that file must not change during the run either.
"""

import errno
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from trainer.errors import DataError
from trainer.manifest import DamagedError
from trainer.paths import converted_dir
from trainer.sources.cached_folder import CachedFolder
from trainer.sources.compression import decompressed_chunks, split_suffix
from trainer.sources.stable_file import StableFile

FORMAT = 2  # of the converted copies; increase it if a decompression or a conversion gives another content
COPY, ORIGIN = "content", "origin.json"
HEAD_BYTES = 1 << 16

Chunks = Iterator[bytes]
Convert = Callable[[Chunks, Path], Chunks]
"""Function from the content of a file to that of its copy. The path is for errors. Raises DataError."""


@dataclass(frozen=True, eq=False)
class DataFile:
    """A file that is read by position.

    original  the user's file
    content   what is read: the same file, or its converted copy
    """

    original: StableFile
    content: StableFile

    @property
    def path(self) -> Path:
        """Path of the user's file."""
        return self.original.path

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open the content, and check that neither file has changed. Raises DataError."""
        if self.content is not self.original:
            self.original.check()
        with self.content.open() as file:
            yield file


def open_data_file(path: Path, convert: Convert | None = None) -> DataFile:
    """Open a file. A copy is made if the file is compressed or if a conversion is given. Raises DataError."""
    original = StableFile(path)
    if convert is None and not split_suffix(path)[1]:
        return DataFile(original, original)
    copy = _copy_folder(original, convert).get()
    return DataFile(original, StableFile(copy, f"the content of {path}"))


def read_head(path: Path) -> bytes:
    """Return the first bytes of the content of a file, decompressed. Raises DataError."""
    return next(_content(StableFile(path)), b"")[:HEAD_BYTES]


def _content(original: StableFile) -> Chunks:
    """Yield the decompressed content of a file. Raises DataError for errors of the file only, not of the consumer."""
    suffix = split_suffix(original.path)[1]
    with original.open() as file:
        if suffix:
            yield from decompressed_chunks(file, suffix, original.path, original.stamp[0])
        else:
            yield from iter(lambda: file.read(HEAD_BYTES), b"")


def _copy_folder(original: StableFile, convert: Convert | None) -> CachedFolder[Path]:
    """Return the folder of a copy. There is one for each file and conversion; it is made again if the file changes."""
    name = f"{convert.__module__}.{convert.__qualname__}" if convert else "plain"
    key = hashlib.sha256(json.dumps([FORMAT, name, str(original.path.resolve())]).encode()).hexdigest()[:32]
    origin = json.dumps(original.stamp)

    def write(folder: Path) -> None:
        chunks = _content(original)
        _write(folder / COPY, convert(chunks, original.path) if convert else chunks, original.path)
        (folder / ORIGIN).write_text(origin, encoding="utf-8")

    def load(folder: Path) -> Path:
        if (folder / ORIGIN).read_text(encoding="utf-8") != origin:
            raise DamagedError(f"{original.path} has changed")
        return folder / COPY

    return CachedFolder(f"the converted copy of {original.path}", converted_dir() / key, write, load)


def _write(copy: Path, chunks: Chunks, path: Path) -> None:
    try:
        with copy.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DataError(
            f"the content of {path} does not fit on the disk of {converted_dir()} ({error.strerror}): free disk "
            "space, or set TUTELAGE_CACHE to another directory"
        ) from error
