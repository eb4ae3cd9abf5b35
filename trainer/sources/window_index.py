"""The window index of a source: the position of every window, so that a text is cut once and stays on disk.

An index is stored in the cache. Its name is a digest of everything that determines it: sizes and times of the files,
columns, tokenizer, window length. A later start verifies its manifest and maps it into memory; a damaged index is
rebuilt. If the cache cannot be written, the index is built for one start only. Each window has a checksum, so that a
window whose bytes have changed since it was indexed is an error.
"""

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray

from alignment import Vocabulary
from trainer.errors import DataError
from trainer.paths import windows_dir
from trainer.sources.base import Documents, FormatInfo
from trainer.sources.cached_folder import CachedFolder
from trainer.sources.config import CONTENT_KEYS, SourceConfig
from trainer.sources.record_formats.base import InvalidRecordError
from trainer.sources.window_indexer import DOCUMENT, WINDOW, IndexSummary, WindowIndexer, check_invalid
from trainer.sources.windows import CHUNK_BYTES

FORMAT = 5  # version of the stored files, of the way that texts are cut, and of the normal form of chats
_Stored = tuple[IndexSummary, NDArray[np.void], NDArray[np.void]]


@dataclass(frozen=True, eq=False)
class WindowIndex:
    """The windows of one source.

    inputs     files or datasets of the source
    documents  [documents] records of dtype DOCUMENT, mapped from disk
    windows    [windows] records of dtype WINDOW, mapped from disk
    """

    source: SourceConfig
    inputs: Sequence[Documents]
    summary: IndexSummary
    documents: NDArray[np.void]
    windows: NDArray[np.void]

    @property
    def format(self) -> FormatInfo:
        """The record format, which all inputs share."""
        return self.inputs[0].format

    def prompt_bytes(self, window: int) -> int:
        """Return the number of leading bytes of a window that are a masked prompt."""
        return int(self._document(window)["prompt_bytes"])

    def content(self, window: int) -> bytes:
        """Read the bytes of a window. Raises DataError, naming the sample, if they differ from the indexed ones."""
        record, document = self.windows[window], self._document(window)
        try:
            content = self._input(window).read(
                int(document["offset"]), int(document["length"]), int(record["begin"]), int(record["end"])
            )
        except (InvalidRecordError, IndexError) as error:
            raise DataError(f"sample {self.name(window)} has changed since it was indexed: {error}") from error
        if zlib.crc32(content) != record["crc32"]:
            raise DataError(f"sample {self.name(window)} has changed since it was indexed: its bytes differ")
        return content

    def name(self, window: int) -> str:
        """Return the name of a window's sample: FILE:LINE, FILE#WINDOW or FILE:LINE#WINDOW."""
        number = int(self._document(window)["number"])
        document = f"{self._input(window).name}:{number}" if number else self._input(window).name
        return document if self.format.is_whole else f"{document}#{self.windows[window]['number']}"

    def domain(self, window: int) -> str:
        """Return the value of the domain column, else the name of the source, else the name of the file or dataset."""
        number = int(self._document(window)["domain"])
        return self.summary.domains[number] if number >= 0 else self.source.name or self._input(window).name

    def teacher(self, window: int) -> str | None:
        """Return the value of the teacher column; None without a column."""
        number = int(self._document(window)["teacher"])
        return self.summary.teachers[number] if number >= 0 else None

    def ends_document(self, window: int | NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return, in the shape of `window`, whether the windows are the last ones of their documents."""
        document, last = self.windows["document"], len(self.windows) - 1
        ends: NDArray[np.bool_] = np.equal(window, last) | (document[np.minimum(window + 1, last)] != document[window])
        return ends

    def _document(self, window: int) -> np.void:
        record: np.void = self.documents[self.windows[window]["document"]]
        return record

    def _input(self, window: int) -> Documents:
        return self.inputs[int(self._document(window)["input"])]


def index_source(
    source: SourceConfig, inputs: Sequence[Documents], vocabulary: Vocabulary, window_tokens: int, max_invalid: int
) -> WindowIndex:
    """Load the index of a source from the cache, or build it.

    Raises DataError if more than `max_invalid` lines and rows cannot be read, or if no disk has space for the index.
    """

    def write(folder: Path) -> None:  # may be called again after a full disk
        WindowIndexer(vocabulary, window_tokens, max_invalid).run(inputs, folder)

    summary, documents, windows = CachedFolder(
        what="the window index",
        folder=windows_dir() / _index_key(source, inputs, vocabulary, window_tokens),
        write=write,
        load=_load,
        stays_open=True,
    ).get()
    check_invalid(summary, max_invalid)
    return WindowIndex(source, inputs, summary, documents, windows)


def _index_key(source: SourceConfig, inputs: Sequence[Documents], vocabulary: Vocabulary, window_tokens: int) -> str:
    columns = source.model_dump(include=CONTENT_KEYS | {"domain_column", "teacher_column"})
    values = [FORMAT, CHUNK_BYTES, tokenizers.__version__, vocabulary.fingerprint, window_tokens, columns]
    return hashlib.sha256(json.dumps([*values, [each.identity for each in inputs]]).encode()).hexdigest()[:32]


def _load(folder: Path) -> _Stored:
    """Map a stored index into memory."""
    summary = IndexSummary(**json.loads((folder / "summary.json").read_text(encoding="utf-8")))
    return summary, _map_records(folder / "documents", DOCUMENT), _map_records(folder / "windows", WINDOW)


def _map_records(path: Path, dtype: np.dtype[np.void]) -> NDArray[np.void]:
    # An empty file cannot be mapped.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r")) if path.stat().st_size else np.empty(0, dtype=dtype)
