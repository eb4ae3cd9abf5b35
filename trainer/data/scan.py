"""One pass over a source: documents found, cut into windows, counted, and written down as numbers.

Reading, tokenizing and writing go on side by side, a few hundred KiB at a time; what is written keeps the order.
"""

import hashlib
import json
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np

from alignment import Vocabulary
from trainer.config import SourceConfig
from trainer.data.sources import Broken, Documents
from trainer.data.windows import STRETCH_BYTES, cut
from trainer.errors import DataError

T = TypeVar("T")
R = TypeVar("R")
NAMED_BROKEN = 20
BATCH_BYTES = STRETCH_BYTES * max(2, os.cpu_count() or 1)  # tokenized at once, on all cores
BATCHES_AT_ONCE = 2
DOCUMENT = np.dtype(
    [("part", "<i4"), ("place", "<i8"), ("length", "<i8"), ("number", "<i8"), ("domain", "<i4"), ("teacher", "<i4")]
)
WINDOW = np.dtype(
    [("document", "<i8"), ("nth", "<i4"), ("begin", "<i8"), ("end", "<i8"), ("tokens", "<i4"), ("crc", "<u4")]
)


@dataclass
class Summary:
    """What a pass over a source has seen.

    tokens      of the student, each window read alone; 0 of chats, which only a template writes
    num_bytes   of text, or of chats as JSON
    broken      lines and rows that could not be read; the first of them by name
    domains     and teachers: the names that columns gave, as documents number them
    fingerprint sha256 of contents and cuts, whatever the files are called
    """

    documents: int = 0
    windows: int = 0
    tokens: int = 0
    num_bytes: int = 0
    broken: int = 0
    first_broken: list[str] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)
    teachers: list[str] = field(default_factory=list)
    fingerprint: str = ""


def check_broken(summary: Summary, max_broken: int) -> None:
    if summary.broken > max_broken:
        raise DataError(
            f"{'; '.join(summary.first_broken)} ({summary.broken} cannot be read, and data.max_broken leaves room for "
            f"{max_broken})"
        )


class _Piece(NamedTuple):
    """A stretch of a document's content; `names` are the domain and teacher of its columns."""

    document: int
    begin: int
    data: bytes
    names: tuple[str | None, str | None]


class Pass:
    """One pass; `run` makes it and writes the files documents, windows and summary.json into a folder.

    Raises DataError if more than max_broken lines and rows cannot be read, as soon as they are.
    """

    def __init__(self, source: SourceConfig, vocabulary: Vocabulary, window_tokens: int, max_broken: int) -> None:
        self._has_chats = source.messages_column is not None
        self._vocabulary = vocabulary
        self._window_tokens = window_tokens
        self._max_broken = max_broken
        self._summary = Summary()
        self._domains: dict[str, int] = {}
        self._teachers: dict[str, int] = {}
        self._digest = hashlib.sha256()
        self._nth = 0

    def run(self, parts: Sequence[Documents], folder: Path) -> None:
        with (folder / "documents").open("wb") as documents, (folder / "windows").open("wb") as windows:
            with ThreadPoolExecutor(BATCHES_AT_ONCE) as pool:
                batches = _batches(self._pieces(parts, documents))
                for batch, cuts in _in_order(pool, self._cut, batches):
                    for piece, ends in zip(batch, cuts, strict=True):
                        windows.write(self._windows(piece, ends))
        summary = self._summary
        summary.domains, summary.teachers = list(self._domains), list(self._teachers)
        summary.fingerprint = self._digest.hexdigest()
        (folder / "summary.json").write_text(json.dumps(asdict(summary)), encoding="utf-8")

    def _pieces(self, parts: Sequence[Documents], documents: BinaryIO) -> Iterator[_Piece]:
        summary = self._summary
        for number, part in enumerate(parts):
            for found in part.scan():
                if isinstance(found, Broken):
                    summary.broken += 1
                    summary.first_broken += [found.sentence][: NAMED_BROKEN - len(summary.first_broken)]
                    check_broken(summary, self._max_broken)
                    continue
                names = [_number(self._domains, found.domain), _number(self._teachers, found.teacher)]
                record = (number, found.place, found.length, found.number, *names)
                documents.write(np.array(record, dtype=DOCUMENT).tobytes())
                begin = 0
                for data in found.stretches:
                    yield _Piece(summary.documents, begin, data, (found.domain, found.teacher))
                    begin += len(data)
                summary.documents += 1

    def _cut(self, batch: Sequence[_Piece]) -> list[list[tuple[int, int]]]:
        if self._has_chats:
            return [[(len(piece.data), 0)] for piece in batch]
        return cut([piece.data.decode() for piece in batch], self._vocabulary, self._window_tokens)

    def _windows(self, piece: _Piece, cuts: Sequence[tuple[int, int]]) -> bytes:
        """The records of a piece's windows; counted, and part of the fingerprint."""
        self._nth = self._nth if piece.begin else 0
        names = piece.names if not piece.begin else ()
        self._digest.update(json.dumps([piece.begin, len(piece.data), names, cuts]).encode())
        self._digest.update(piece.data)
        records = [
            (piece.document, nth, piece.begin + a, piece.begin + b, tokens, zlib.crc32(piece.data[a:b]))
            for nth, ((a, _), (b, tokens)) in enumerate(pairwise([(0, 0), *cuts]), self._nth)
        ]
        self._nth += len(records)
        self._summary.windows += len(records)
        self._summary.tokens += sum(tokens for _, tokens in cuts)
        self._summary.num_bytes += len(piece.data)
        return np.array(records, dtype=WINDOW).tobytes()


def _number(known: dict[str, int], name: str | None) -> int:
    return -1 if name is None else known.setdefault(name, len(known))


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.data)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _in_order(pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, R]]:
    """Items and what became of them, in their order, a few of them ahead."""
    waiting: deque[tuple[T, Future[R]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(work, item)))
        if len(waiting) > BATCHES_AT_ONCE:
            done, future = waiting.popleft()
            yield done, future.result()
    for done, future in waiting:
        yield done, future.result()
