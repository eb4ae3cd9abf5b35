"""The encoding of data files: UTF-8, perhaps with a byte order mark in front, which is not text.

Files of other kinds whose suffix says that they are text are recognized by their first bytes.
"""

import codecs
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

from trainer.errors import DataError
from trainer.sources.compression import split_suffix

UTF8_MARK = codecs.BOM_UTF8
HEAD_BYTES = 16  # of a file, by which its kind is recognized
_OTHER_MARKS = (  # longest first: UTF-32 begins as UTF-16 does
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
# Positions of zero bytes among the first four bytes, for two or one ASCII characters without a mark.
_ZEROS = {(1, 3): "UTF-16LE", (0, 2): "UTF-16BE", (1, 2, 3): "UTF-32LE", (0, 1, 2): "UTF-32BE"}
_COMPRESSED = {
    ".gz": re.compile(rb"\x1f\x8b"),
    ".zst": re.compile(rb"\x28\xb5\x2f\xfd"),
    ".bz2": re.compile(rb"BZh[1-9]1AY&SY"),
    ".xz": re.compile(rb"\xfd7zXZ\0"),
}
_BINARY = {  # first bytes -> what the file is, and what to do
    b"PAR1\x15": ("a Parquet file", 'name it *.parquet, or set file_format = "parquet" in its source'),
    b"ARROW1\0": ("an Arrow file", 'name it *.arrow, or set file_format = "arrow" in its source'),
    b"PK\3\4": ("a zip archive", "extract it and list the files, or export a spreadsheet as CSV"),
}


def mark_length(head: bytes, path: Path) -> int:
    """Return the number of bytes of the byte order mark.

    head  the first bytes of a file, at least HEAD_BYTES if it has as many
    Raises DataError for UTF-16, UTF-32, a compressed content and other binary files.
    """
    _check_binary(head, path)
    zeros = tuple(i for i, byte in enumerate(head[:4]) if byte == 0)
    marked = next((name for mark, name in _OTHER_MARKS if head.startswith(mark)), None)
    if other := marked or (_ZEROS.get(zeros) if len(head) >= 4 else None):
        raise DataError(
            f"{path} is {other}, expected UTF-8: convert it, for example with `iconv --from-code {other} --to-code "
            "UTF-8`"
        )
    return len(UTF8_MARK) if head.startswith(UTF8_MARK) else 0


def _check_binary(head: bytes, path: Path) -> None:
    """Raise DataError for the first bytes of a compressed content or of another binary file."""
    for suffix, magic in _COMPRESSED.items():
        if magic.match(head):
            remedy = "decompress it once more" if split_suffix(path)[1] else f"name it {path.name}{suffix}"
            raise DataError(f"the content of {path} is compressed ({suffix}), expected text: {remedy}")
    for first_bytes, (kind, remedy) in _BINARY.items():
        if head.startswith(first_bytes):
            raise DataError(f"{path} is {kind}, expected text: {remedy}")


def decoded(chunks: Iterable[bytes], path: Path) -> Iterator[str]:
    """Decode the chunks of a file, without its byte order mark.

    Raises DataError as mark_length does, and with the offset of the first byte that is not UTF-8.
    """
    chunks = iter(chunks)
    head = b"".join(islice(chunks, 1))
    while len(head) < HEAD_BYTES and (more := next(chunks, b"")):
        head += more
    begin = mark_length(head, path)
    decoder = codecs.getincrementaldecoder("utf-8")()
    for chunk in chain([head[begin:]], chunks):
        pending = len(decoder.getstate()[0])
        try:
            yield decoder.decode(chunk)
        except UnicodeDecodeError as error:
            raise DataError(not_utf8(error, begin - pending, path)) from error
        begin += len(chunk)
    if rest := decoder.getstate()[0]:
        raise DataError(f"{path} is not UTF-8: it ends within the character that begins at {begin - len(rest)}")


def not_utf8(error: UnicodeDecodeError, begin: int, path: Path) -> str:
    """Return the message for a file that is not UTF-8. `begin` is the file offset of the bytes that were decoded."""
    return (
        f"{path} is {describe_utf8_error(error, begin)}: convert it from its encoding, for example with `iconv "
        "--from-code WINDOWS-1252 --to-code UTF-8`"
    )


def describe_utf8_error(error: UnicodeDecodeError, begin: int) -> str:
    """Describe the first byte that is not UTF-8. `begin` is the file offset of the bytes that were decoded."""
    return f"not UTF-8: byte 0x{error.object[error.start]:02x} at {begin + error.start}"
