"""Compressed files: recognized by their last suffix, and decompressed as a stream of chunks."""

import bz2
import gzip
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from trainer.errors import DataError

CHUNK_BYTES = 1 << 20
MAX_RATIO = 200  # compressed size to content; real text reaches 20
MIN_LIMIT_BYTES = 1 << 30  # a content below this size may have any ratio


def _open_zstd(file: BinaryIO) -> Any:
    import pyarrow  # takes a moment to load

    own = os.fdopen(os.dup(file.fileno()), "rb")  # pyarrow closes it
    return pyarrow.CompressedInputStream(own, "zstd")


DECOMPRESSORS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": gzip.open,
    ".zst": _open_zstd,
    ".bz2": bz2.open,
    ".xz": lzma.open,
}
"""Suffix -> function that opens a compressed stream for reading."""


def split_suffix(path: Path) -> tuple[str, str]:
    """Return the suffix of the format and that of the compression, in lower case: (".jsonl", ".gz") or (".txt", "")."""
    last = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), last) if last in DECOMPRESSORS else (last, "")


def decompressed_chunks(file: BinaryIO, suffix: str, path: Path, size: int) -> Iterator[bytes]:
    """Yield the content of a compressed file of `size` bytes. Raises DataError if it is damaged or far too large."""
    limit, total = max(MIN_LIMIT_BYTES, MAX_RATIO * size), 0
    for chunk in _chunks(DECOMPRESSORS[suffix], file, path):
        total += len(chunk)
        if total > limit:
            raise DataError(
                f"the content of {path} is larger than {limit >> 20} MiB, {MAX_RATIO} times its size: if that is "
                "right, decompress the file and list the result"
            )
        yield chunk


def _chunks(open_stream: Callable[[BinaryIO], Any], file: BinaryIO, path: Path) -> Iterable[bytes]:
    # pyarrow raises OSError and ValueError, gzip EOFError, OSError and zlib.error.
    try:
        with open_stream(file) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk
    except (EOFError, OSError, ValueError, MemoryError, zlib.error, lzma.LZMAError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(f"cannot decompress {path}: {reason}") from error
