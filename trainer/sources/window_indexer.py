"""The indexing pass over a source: scan its documents, cut them into windows, and write one record per window.

Scanning, tokenizing and writing run at the same time, on batches of a few hundred KiB; the records keep the order of
the documents.
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
from trainer.errors import DataError
from trainer.sources.base import DocumentRef, Documents, EmptyRecord, FormatInfo, InvalidRecord
from trainer.sources.windows import CHUNK_BYTES, cut_batch

T = TypeVar("T")
R = TypeVar("R")
MAX_NAMED_INVALID = 20
BATCH_BYTES = CHUNK_BYTES * max(2, os.cpu_count() or 1)  # tokenized in one call, on all cores
NUM_PENDING_BATCHES = 2
# Document: index of its file or dataset; offset, length, number and prompt_bytes as in DocumentRef; indices of its
# domain and its teacher in IndexSummary, -1 without one.
DOCUMENT = np.dtype(
    [
        ("input", "<i4"), ("offset", "<i8"), ("length", "<i8"), ("number", "<i8"), ("prompt_bytes", "<i8"),
        ("domain", "<i4"), ("teacher", "<i4"),
    ]
)  # fmt: skip
# Window: index of its document; its number within the document, from 0; its bytes [begin, end) of the document's
# content; its tokens when tokenized alone, 0 for a chat; CRC-32 of its bytes.
WINDOW = np.dtype(
    [("document", "<i8"), ("number", "<i4"), ("begin", "<i8"), ("end", "<i8"), ("tokens", "<i4"), ("crc32", "<u4")]
)


@dataclass
class IndexSummary:
    """Counts of one source.

    tokens         tokens of the student, each window tokenized alone; 0 for chats, whose tokens depend on a template
    num_bytes      bytes of text, or of chats as JSON
    invalid        number of lines and rows that cannot be read
    first_invalid  error messages of the first invalid lines and rows
    empty          number of lines and rows with an empty text or an empty chat
    domains        distinct values of the domain column; documents refer to them by index
    teachers       distinct values of the teacher column; documents refer to them by index
    fingerprint    sha256 of the contents and the windows, independent of file names
    """

    documents: int = 0
    windows: int = 0
    tokens: int = 0
    num_bytes: int = 0
    invalid: int = 0
    first_invalid: list[str] = field(default_factory=list)
    empty: int = 0
    domains: list[str] = field(default_factory=list)
    teachers: list[str] = field(default_factory=list)
    fingerprint: str = ""


def check_invalid(summary: IndexSummary, max_invalid: int) -> None:
    """Raise DataError, naming the first invalid records, if there are more than `max_invalid`."""
    if summary.invalid > max_invalid:
        raise DataError(
            f"{'; '.join(summary.first_invalid)} ({summary.invalid} invalid records, and data.max_invalid allows "
            f"{max_invalid} in this source)"
        )


class _Chunk(NamedTuple):
    """One chunk of a document's content.

    document  index of the document
    begin     byte offset of the chunk in the content
    labels    domain, teacher and prompt length of the document
    """

    document: int
    begin: int
    data: bytes
    labels: tuple[str | int | None, ...]


class WindowIndexer:
    """One indexing pass. `run` writes the files `documents`, `windows` and `summary.json`.

    Raises DataError as soon as more than `max_invalid` lines and rows cannot be read.
    """

    def __init__(self, vocabulary: Vocabulary, window_tokens: int, max_invalid: int) -> None:
        self._format = FormatInfo("")
        self._vocabulary = vocabulary
        self._window_tokens = window_tokens
        self._max_invalid = max_invalid
        self._summary = IndexSummary()
        self._domains: dict[str, int] = {}
        self._teachers: dict[str, int] = {}
        self._digest = hashlib.sha256()
        self._next_number = 0  # number of the next window of the current document

    def run(self, inputs: Sequence[Documents], folder: Path) -> None:
        """Index the documents of all inputs, of one format, and write the three files into the folder."""
        self._format = inputs[0].format
        with (folder / "documents").open("wb") as documents, (folder / "windows").open("wb") as windows:
            with ThreadPoolExecutor(NUM_PENDING_BATCHES) as pool:
                batches = _batches(self._chunks(inputs, documents))
                for batch, cuts in _map_in_order(pool, self._cut, batches):
                    for chunk, ends in zip(batch, cuts, strict=True):
                        windows.write(self._window_records(chunk, ends))
        summary = self._summary
        summary.domains, summary.teachers = list(self._domains), list(self._teachers)
        summary.fingerprint = self._digest.hexdigest()
        (folder / "summary.json").write_text(json.dumps(asdict(summary)), encoding="utf-8")

    def _chunks(self, inputs: Sequence[Documents], documents: BinaryIO) -> Iterator[_Chunk]:
        """Yield the chunks of all documents. Write one record per document; count the invalid records."""
        for i, source in enumerate(inputs):
            for record in source.scan():
                if isinstance(record, InvalidRecord):
                    self._count_invalid(record)
                    continue
                if isinstance(record, EmptyRecord):
                    self._summary.empty += 1
                    continue
                documents.write(self._document_record(i, record))
                begin = 0
                for data in record.chunks:
                    labels = (record.domain, record.teacher, *([record.prompt_bytes] if record.prompt_bytes else []))
                    yield _Chunk(self._summary.documents, begin, data, labels)
                    begin += len(data)
                self._summary.documents += 1

    def _count_invalid(self, record: InvalidRecord) -> None:
        summary = self._summary
        summary.invalid += 1
        if len(summary.first_invalid) < MAX_NAMED_INVALID:
            summary.first_invalid.append(record.message)
        check_invalid(summary, self._max_invalid)

    def _document_record(self, input_index: int, document: DocumentRef) -> bytes:
        labels = _label_index(self._domains, document.domain), _label_index(self._teachers, document.teacher)
        position = input_index, document.offset, document.length, document.number
        record = (*position, document.prompt_bytes, *labels)
        return np.array(record, dtype=DOCUMENT).tobytes()

    def _cut(self, batch: Sequence[_Chunk]) -> list[list[tuple[int, int]]]:
        if self._format.is_chat:
            return [[(len(chunk.data), 0)] for chunk in batch]
        if self._format.is_whole:
            counts = self._vocabulary.num_tokens([chunk.data.decode() for chunk in batch])
            return [[(len(chunk.data), count)] for chunk, count in zip(batch, counts, strict=True)]
        return cut_batch([chunk.data.decode() for chunk in batch], self._vocabulary, self._window_tokens)

    def _window_records(self, chunk: _Chunk, cuts: Sequence[tuple[int, int]]) -> bytes:
        """Return the records of a chunk's windows. Add the windows to the summary and to the fingerprint."""
        self._next_number = self._next_number if chunk.begin else 0
        labels = chunk.labels if not chunk.begin else ()
        self._digest.update(json.dumps([chunk.begin, len(chunk.data), labels, cuts]).encode())
        self._digest.update(chunk.data)
        records = [
            (chunk.document, number, chunk.begin + a, chunk.begin + b, tokens, zlib.crc32(chunk.data[a:b]))
            for number, ((a, _), (b, tokens)) in enumerate(pairwise([(0, 0), *cuts]), self._next_number)
        ]
        self._next_number += len(records)
        self._summary.windows += len(records)
        self._summary.tokens += sum(tokens for _, tokens in cuts)
        self._summary.num_bytes += len(chunk.data)
        return np.array(records, dtype=WINDOW).tobytes()


def _label_index(indices: dict[str, int], label: str | None) -> int:
    """Return the index of a label, which is added to `indices` if it is new; -1 for None."""
    return -1 if label is None else indices.setdefault(label, len(indices))


def _batches(chunks: Iterable[_Chunk]) -> Iterator[list[_Chunk]]:
    """Group consecutive chunks into batches of at least BATCH_BYTES; the last batch may be smaller."""
    batch: list[_Chunk] = []
    size = 0
    for chunk in chunks:
        batch.append(chunk)
        size += len(chunk.data)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _map_in_order(pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, R]]:
    """Yield (item, work(item)) in the order of the items, with at most NUM_PENDING_BATCHES + 1 items in the pool."""
    pending: deque[tuple[T, Future[R]]] = deque()
    for item in items:
        pending.append((item, pool.submit(work, item)))
        if len(pending) > NUM_PENDING_BATCHES:
            done, future = pending.popleft()
            yield done, future.result()
    for done, future in pending:
        yield done, future.result()
