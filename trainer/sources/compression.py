"""Compressed files: recognized by their last suffix, and decompressed as a stream of chunks."""

import bz2
import gzip
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from trainer.errors import DataError

CHUNK_BYTES = 1 << 20
MAX_RATIO = 200  # compressed size to content; real text reaches 20
MAX_XZ_MEMORY_BYTES = 1 << 30  # of the decompressor; a file of xz -9 needs 65 MiB
MIN_LIMIT_BYTES = 1 << 30  # a content below this size may have any ratio


def _read_gzip(file: BinaryIO) -> Iterator[bytes]:
    with gzip.open(file) as stream:
        yield from iter(lambda: stream.read(CHUNK_BYTES), b"")


def _read_zstd(file: BinaryIO) -> Iterator[bytes]:
    import pyarrow  # takes a moment to load

    own = os.fdopen(os.dup(file.fileno()), "rb")  # pyarrow closes it
    with pyarrow.CompressedInputStream(own, "zstd") as stream:
        yield from iter(lambda: stream.read(CHUNK_BYTES), b"")


def _read_streams(new_decompressor: Callable[[], Any], file: BinaryIO) -> Iterator[bytes]:
    """Yield the content of consecutive bz2 or xz streams, with zero bytes between them.

    bz2.open and lzma.open take a damaged stream that follows another one for the end of the file.
    """
    data = file.read(CHUNK_BYTES)
    while data:
        decompressor = new_decompressor()
        while not decompressor.eof:
            if decompressor.needs_input and not data:
                data = file.read(CHUNK_BYTES)
                if not data:
                    raise EOFError("it ends within a stream")
            if chunk := decompressor.decompress(data, CHUNK_BYTES):
                yield chunk
            data = b""
        data = decompressor.unused_data.lstrip(b"\0")
        while not data and (more := file.read(CHUNK_BYTES)):
            data = more.lstrip(b"\0")


DECOMPRESSORS: dict[str, Callable[[BinaryIO], Iterator[bytes]]] = {
    ".gz": _read_gzip,
    ".zst": _read_zstd,
    ".bz2": partial(_read_streams, bz2.BZ2Decompressor),
    ".xz": partial(_read_streams, partial(lzma.LZMADecompressor, memlimit=MAX_XZ_MEMORY_BYTES)),
}
"""Suffix -> function that yields the content of a compressed file in chunks."""


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


def _chunks(read: Callable[[BinaryIO], Iterator[bytes]], file: BinaryIO, path: Path) -> Iterator[bytes]:
    # pyarrow raises OSError and ValueError; gzip EOFError, OSError and zlib.error; bz2 OSError and ValueError; lzma
    # LZMAError and MemoryError; _read_streams EOFError.
    try:
        yield from read(file)
    except (EOFError, OSError, ValueError, MemoryError, zlib.error, lzma.LZMAError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        if reason == "Memory usage limit exceeded":
            reason = (
                f"it needs more than {MAX_XZ_MEMORY_BYTES >> 20} MiB of memory: decompress it, and list the result or "
                "compress it with a smaller dictionary, for example with `xz -9`"
            )
        raise DataError(f"cannot decompress {path}: {reason}") from error
