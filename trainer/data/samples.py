"""Samples: chats, and windows of text that every model can see whole; read from their files when they are asked for."""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from alignment import Tokens, Vocabulary
from trainer.config import DataConfig, EvalConfig, SourceConfig
from trainer.data.index import Index, index_source
from trainer.data.order import Order, weighted
from trainer.data.sources import Documents, open_file
from trainer.data.tables import open_dataset, open_parquet
from trainer.errors import DataError
from trainer.places import find_data

Message = Mapping[str, Any]
NAMED_BROKEN = 3  # of a source, where its figures are shown


@dataclass(frozen=True)
class Sample:
    """One window of text, or one chat. `name` says where it came from; `closes` whether EOS follows.

    domain and teacher are what `adaptive` and `router` go by.
    """

    index: int
    name: str
    text: str = ""
    closes: bool = False
    written_by: int | None = None  # version of the student's weights, for text that it wrote itself
    messages: tuple[Message, ...] = ()
    tools: tuple[Message, ...] = ()
    domain: str = ""
    teacher: str | None = None

    @property
    def is_chat(self) -> bool:
        return bool(self.messages)


@dataclass(frozen=True)
class SourceCounts:
    """What a source holds, in all its documents; tokens are the student's, None of chats.

    num_bytes      of text, or of chats as JSON
    epoch_samples  how many of its windows are trained on in one epoch
    broken         lines and rows that cannot be read; the first few of them by name
    """

    name: str
    documents: int
    windows: int
    tokens: int | None
    num_bytes: int
    epoch_samples: int
    broken: int
    first_broken: tuple[str, ...]


class Samples(Sequence[Sample]):
    """Some windows of some sources, numbered source by source. Each is read when it is asked for, by any thread.

    chosen  of each source, the numbers of its windows; closes: EOS follows the last window of a text
    Raises DataError, naming the file or the sample, where what is read is not what was indexed.
    """

    def __init__(self, indexes: Sequence[Index], chosen: Sequence[NDArray[np.int64]], closes: bool) -> None:
        self._indexes = indexes
        self.chosen = chosen
        self._closes = closes
        self._firsts = [0, *accumulate(map(len, chosen))]

    def __len__(self) -> int:
        return self._firsts[-1]

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self._read(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self._read(index % len(self))

    def _read(self, at: int) -> Sample:
        source = bisect_right(self._firsts, at) - 1
        index, window = self._indexes[source], int(self.chosen[source][at - self._firsts[source]])
        content = index.content(window)
        named = Sample(at, index.name(window), domain=index.domain(window), teacher=index.teacher(window))
        if index.source.messages_column is not None:
            messages, tools = json.loads(content)
            return replace(named, messages=tuple(messages), tools=tuple(tools))
        return replace(named, text=content.decode(), closes=self._closes and bool(index.ends_document(window)))

    def teachers(self) -> dict[str | None, str]:
        """Every teacher that a column names, None for none, with the name of the first sample for it."""
        found: dict[str | None, str] = {}
        for index, chosen in zip(self._indexes, self.chosen, strict=True):
            numbers = index.documents["teacher"][index.windows["document"][chosen]]
            for first in np.sort(np.unique(numbers, return_index=True)[1]):
                window = int(chosen[first])
                found.setdefault(index.teacher(window), index.name(window))
        return found


@dataclass(frozen=True)
class Corpus:
    """What is trained on, in which order, and what is held out; indices count within each.

    fingerprint  another whenever the samples to train on are, whatever their files are called
    """

    train: Samples
    held_out: Samples
    order: Order
    sources: tuple[SourceCounts, ...]
    fingerprint: str


def load_corpus(data: DataConfig, evaluation: EvalConfig, vocabulary: Vocabulary, seed: int) -> Corpus:
    """Find the windows of every source, and set held-out documents aside. Raises DataError for what cannot be used."""
    indexes: list[Index] = []
    for source in data.sources:
        room = data.max_broken - sum(index.summary.broken for index in indexes)
        indexes.append(index_source(source, _opened(source), vocabulary, data.window_tokens, room))
    aside = _held_out([index.summary.documents for index in indexes], evaluation.held_out_documents, seed)
    usable = [_usable(index, data) for index in indexes]
    is_held = [held[index.windows["document"][u]] for index, held, u in zip(indexes, aside, usable, strict=True)]
    held_out = _draw([u[held] for u, held in zip(usable, is_held, strict=True)], evaluation.max_samples, seed)
    train = _draw([u[~held] for u, held in zip(usable, is_held, strict=True)], data.max_samples, seed)
    order = weighted([len(chosen) for chosen in train], [source.weight for source in data.sources], seed)
    counts = tuple(_counts(index, draws) for index, draws in zip(indexes, order.draws, strict=True))
    for held in counts:
        if not held.epoch_samples:
            raise DataError(
                f"{held.name}: no window of at least two tokens to train on, with its weight, data.max_samples and "
                "eval.held_out_documents"
            )
    closes = data.close_documents
    samples = (Samples(indexes, train, closes), Samples(indexes, held_out, closes))
    return Corpus(*samples, order, counts, _fingerprint(indexes, train, closes))


def _fingerprint(indexes: Sequence[Index], chosen: Sequence[NDArray[np.int64]], closes: bool) -> str:
    digest = hashlib.sha256(f"{closes}".encode())
    for index, windows in zip(indexes, chosen, strict=True):
        digest.update(f"{index.summary.fingerprint} {len(windows)}".encode() + windows.tobytes())
    return digest.hexdigest()


def _opened(source: SourceConfig) -> list[Documents]:
    if source.dataset is not None:
        return [open_dataset(source)]
    paths = [path for name in source.files for path in find_data(name)]
    return [open_parquet(path, source) if path.suffix == ".parquet" else open_file(path, source) for path in paths]


def _held_out(documents: Sequence[int], num_held_out: int, seed: int) -> list[NDArray[np.bool_]]:
    """[documents] of each source: whether it is held out."""
    total = sum(documents)
    if num_held_out and num_held_out >= total:
        raise DataError(f"eval.held_out_documents is {num_held_out}, but there are only {total} documents")
    held = np.zeros(total, dtype=bool)
    held[np.random.default_rng([seed, 0]).permutation(total)[:num_held_out]] = True
    return np.split(held, np.cumsum(documents)[:-1])


def _usable(index: Index, data: DataConfig) -> NDArray[np.int64]:
    """The windows that have a token to predict, as far as each document may be used."""
    if index.source.messages_column is not None:
        return np.arange(len(index.windows))
    closes = index.ends_document(np.arange(len(index.windows))) & data.close_documents
    usable = index.windows["tokens"] + closes >= 2
    if data.max_windows_per_document is not None:
        usable &= index.windows["nth"] < data.max_windows_per_document
    return np.flatnonzero(usable)


def _draw(chosen: list[NDArray[np.int64]], limit: int | None, seed: int) -> list[NDArray[np.int64]]:
    """At most `limit` of them all, by the seed, in their order."""
    total = sum(map(len, chosen))
    if limit is None or limit >= total:
        return chosen
    drawn = np.zeros(total, dtype=bool)
    drawn[np.random.default_rng([seed, 1]).permutation(total)[:limit]] = True
    return [c[d] for c, d in zip(chosen, np.split(drawn, np.cumsum([len(c) for c in chosen])[:-1]), strict=True)]


def _counts(index: Index, draws: int) -> SourceCounts:
    source, seen = index.source, index.summary
    name = source.name or source.dataset or ", ".join(Path(file).name for file in source.files)
    tokens = None if source.messages_column is not None else seen.tokens
    broken = (seen.broken, tuple(seen.first_broken[:NAMED_BROKEN]))
    return SourceCounts(name, seen.documents, seen.windows, tokens, seen.num_bytes, draws, *broken)


def shortened(sample: Sample, tokens: Tokens, limit: int) -> Sample | None:
    """Its beginning, of about `limit` of the tokens that it was read as; of a chat, the turns before its last answer.

    None where nothing is left. Read again, a text may be a token longer: shorten it again.
    """
    if sample.is_chat:
        answers = [
            i for i, m in enumerate(sample.messages) if m.get("role") == "assistant" and m.get("train") is not False
        ]
        return replace(sample, messages=sample.messages[: answers[-2] + 1]) if len(answers) > 1 else None
    data = tokens.text
    cuts = [
        int(end) for end in tokens.ends[: max(limit, 0)] if 0 < end < len(data) and _is_character_end(data, int(end))
    ]
    return replace(sample, text=data[: cuts[-1]].decode(), closes=False) if cuts else None


def _is_character_end(data: bytes, end: int) -> bool:
    return end == len(data) or data[end] & 0xC0 != 0x80
