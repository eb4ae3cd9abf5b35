"""The windows of a source as numbers, so that a text is cut once and never kept in memory.

What a pass over the source has found (scan.py) is kept in a folder of the cache under a key of all that decides it: the
files' sizes and times, the columns, the tokenizer, the window's length. The next start maps it into memory at once.
Each window has a checksum of its bytes: what is read later is what was cut, or an error.
"""

import fcntl
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray

from alignment import Vocabulary
from trainer.config import SourceConfig
from trainer.data.columns import BrokenError
from trainer.data.scan import DOCUMENT, WINDOW, Pass, Summary, check_broken
from trainer.data.sources import Documents
from trainer.data.windows import STRETCH_BYTES
from trainer.errors import DataError
from trainer.places import windows_dir

FORMAT = 1  # of what is kept, and of how texts are cut


@dataclass(frozen=True, eq=False)
class Index:
    """One source, cut. documents and windows are mapped from disk, with the fields of DOCUMENT and WINDOW."""

    source: SourceConfig
    parts: Sequence[Documents]
    summary: Summary
    documents: NDArray[np.void]
    windows: NDArray[np.void]

    def content(self, window: int) -> bytes:
        """The bytes of a window. Raises DataError, naming it, if they are not those that were cut."""
        at, document = self.windows[window], self._document(window)
        try:
            content = self._part(window).read(
                int(document["place"]), int(document["length"]), int(at["begin"]), int(at["end"])
            )
        except (BrokenError, IndexError) as error:
            raise DataError(f"sample {self.name(window)} has changed since it was indexed: {error}") from error
        if zlib.crc32(content) != at["crc"]:
            raise DataError(f"sample {self.name(window)} has changed since it was indexed: its bytes are others")
        return content

    def name(self, window: int) -> str:
        number = int(self._document(window)["number"])
        document = f"{self._part(window).name}:{number}" if number else self._part(window).name
        return document if self.source.messages_column else f"{document}#{self.windows[window]['nth']}"

    def domain(self, window: int) -> str:
        number = int(self._document(window)["domain"])
        return self.summary.domains[number] if number >= 0 else self.source.name or self._part(window).name

    def teacher(self, window: int) -> str | None:
        number = int(self._document(window)["teacher"])
        return self.summary.teachers[number] if number >= 0 else None

    def _document(self, window: int) -> np.void:
        found: np.void = self.documents[self.windows[window]["document"]]
        return found

    def _part(self, window: int) -> Documents:
        return self.parts[int(self._document(window)["part"])]

    def ends_document(self, window: int | NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether windows are the last of their documents, of the shape that is asked for."""
        document, last = self.windows["document"], len(self.windows) - 1
        ends: NDArray[np.bool_] = np.equal(window, last) | (document[np.minimum(window + 1, last)] != document[window])
        return ends


def index_source(
    source: SourceConfig, parts: Sequence[Documents], vocabulary: Vocabulary, window_tokens: int, max_broken: int
) -> Index:
    """From the cache, or made now. Raises DataError if more than max_broken lines and rows cannot be read."""
    columns = source.model_dump(include={"text_column", "messages_column", "domain_column", "teacher_column"})
    depends_on = [FORMAT, STRETCH_BYTES, tokenizers.__version__, vocabulary.fingerprint, window_tokens, columns]
    key = hashlib.sha256(json.dumps([*depends_on, [part.identity for part in parts]]).encode()).hexdigest()[:32]
    folder = windows_dir() / key
    try:
        kept = _load(folder)
        if kept is None:
            with _locked(folder):
                kept = _load(folder) or _make(folder, Pass(source, vocabulary, window_tokens, max_broken), parts)
    except OSError as error:
        raise DataError(
            f"cannot keep windows in {folder.parent} ({error.strerror}): make room or set TUTELAGE_CACHE to another"
        ) from error
    summary, documents, windows = kept
    check_broken(summary, max_broken)
    return Index(source, parts, summary, documents, windows)


_Kept = tuple[Summary, NDArray[np.void], NDArray[np.void]]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process makes an index, others that want it wait."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _load(folder: Path) -> _Kept | None:
    """What was kept; None if there is nothing, or not all of it."""
    try:
        summary = Summary(**json.loads((folder / "summary.json").read_text(encoding="utf-8")))
        documents, windows = _mapped(folder / "documents", DOCUMENT), _mapped(folder / "windows", WINDOW)
    except (FileNotFoundError, ValueError):
        return None
    if (len(documents), len(windows)) != (summary.documents, summary.windows):
        return None
    return summary, documents, windows


def _mapped(path: Path, fields: np.dtype[np.void]) -> NDArray[np.void]:
    return np.asarray(np.memmap(path, dtype=fields, mode="r")) if path.stat().st_size else np.empty(0, dtype=fields)


def _make(folder: Path, made: Pass, parts: Sequence[Documents]) -> _Kept:
    """Written beside its place and moved there, so what is found there is whole."""
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        made.run(parts, partial)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    kept = _load(folder)
    assert kept is not None
    return kept
