"""The encoding of data files: UTF-8, perhaps with a byte order mark in front, which is not text."""

import codecs
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

from trainer.errors import DataError

UTF8_MARK = codecs.BOM_UTF8
_OTHER_MARKS = (  # longest first: UTF-32 begins as UTF-16 does
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
# Positions of zero bytes among the first four bytes, for two or one ASCII characters without a mark.
_ZEROS = {(1, 3): "UTF-16LE", (0, 2): "UTF-16BE", (1, 2, 3): "UTF-32LE", (0, 1, 2): "UTF-32BE"}


def mark_length(head: bytes, path: Path) -> int:
    """Return the number of bytes of the byte order mark. Raises DataError for UTF-16 and UTF-32.

    head  the first bytes of a file, at least four if it has as many
    """
    zeros = tuple(i for i, byte in enumerate(head[:4]) if byte == 0)
    marked = next((name for mark, name in _OTHER_MARKS if head.startswith(mark)), None)
    if other := marked or (_ZEROS.get(zeros) if len(head) >= 4 else None):
        raise DataError(
            f"{path} is {other}, expected UTF-8: convert it, for example with `iconv --from-code {other} --to-code "
            "UTF-8`"
        )
    return len(UTF8_MARK) if head.startswith(UTF8_MARK) else 0


def decoded(chunks: Iterable[bytes], path: Path) -> Iterator[str]:
    """Decode the chunks of a file, without its byte order mark.

    Raises DataError for UTF-16 and UTF-32, and with the offset of the first byte that is not UTF-8.
    """
    chunks = iter(chunks)
    head = b"".join(islice(chunks, 1))
    while len(head) < 4 and (more := next(chunks, b"")):
        head += more
    begin = mark_length(head, path)
    decoder = codecs.getincrementaldecoder("utf-8")()
    for chunk in chain([head[begin:]], chunks):
        pending = len(decoder.getstate()[0])
        try:
            yield decoder.decode(chunk)
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is {describe_utf8_error(error, begin - pending)}") from error
        begin += len(chunk)
    if rest := decoder.getstate()[0]:
        raise DataError(f"{path} is not UTF-8: it ends within the character that begins at {begin - len(rest)}")


def describe_utf8_error(error: UnicodeDecodeError, begin: int) -> str:
    """Describe the first byte that is not UTF-8. `begin` is the file offset of the bytes that were decoded."""
    return f"not UTF-8: byte 0x{error.object[error.start]:02x} at {begin + error.start}"
