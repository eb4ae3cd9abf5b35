"""The corpus of a run: samples of all sources, split into training and held-out samples, and their order."""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from alignment import Vocabulary
from trainer.errors import DataError
from trainer.evaluation.config import EvalConfig
from trainer.records import Sample
from trainer.sources.base import Documents
from trainer.sources.config import DataConfig
from trainer.sources.formats import open_documents
from trainer.sources.input_files import Key, SourceInputs, find_inputs
from trainer.sources.sample_order import SampleOrder, weighted_order
from trainer.sources.window_index import WindowIndex, index_source

MAX_NAMED_INVALID = 3  # messages of invalid records per source that SourceCounts holds
MAX_NAMED_REPEATED = 20


@dataclass(frozen=True)
class SourceCounts:
    """Counts of all documents of one source.

    format         kind of the documents and their columns, for example "chats: column messages"
    is_chat        whether the documents are chats
    has_prompt     whether the documents are texts with a masked prompt
    tokens         tokens of the student; None for chats
    num_bytes      bytes of text, or of chats as JSON
    epoch_samples  number of samples that one epoch draws from the source
    invalid        number of lines and rows that cannot be read
    first_invalid  error messages of the first invalid lines and rows
    empty          number of lines and rows with an empty text or an empty chat, which are not used
    repeated       descriptions of files that the run file names twice; each is read once
    """

    name: str
    format: str
    is_chat: bool
    has_prompt: bool
    documents: int
    windows: int
    tokens: int | None
    num_bytes: int
    epoch_samples: int
    invalid: int
    first_invalid: tuple[str, ...]
    empty: int
    repeated: tuple[str, ...] = ()


class Samples(Sequence[Sample]):
    """Selected windows of several sources as a sequence of samples. Access reads from disk and is thread-safe.

    indexes   the sources
    selected  window numbers of each source
    closes    whether EOS follows the last window of a text
    Access raises DataError, naming the file or the sample, if a file has changed since it was indexed.
    """

    def __init__(self, indexes: Sequence[WindowIndex], selected: Sequence[NDArray[np.int64]], closes: bool) -> None:
        self._indexes = indexes
        self._selected = selected
        self._closes = closes
        self._firsts = [0, *accumulate(map(len, selected))]  # index of the first sample of each source

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

    def _read(self, i: int) -> Sample:
        source = bisect_right(self._firsts, i) - 1
        index, window = self._indexes[source], int(self._selected[source][i - self._firsts[source]])
        content = index.content(window)
        sample = Sample(i, index.name(window), domain=index.domain(window), teacher=index.teacher(window))
        if index.format.is_chat:
            messages, tools = json.loads(content)
            return replace(sample, messages=tuple(messages), tools=tuple(tools))
        closes = self._closes and bool(index.ends_document(window))
        return replace(sample, text=content.decode(), closes=closes, prompt_bytes=index.prompt_bytes(window))

    def chat_indices(self) -> Iterator[int]:
        """Yield the indices of all chats, in order."""
        for first, stop in pairwise(self._firsts):
            if first < stop and self._read(first).is_chat:  # a source has either texts or chats
                yield from range(first, stop)

    def teachers(self) -> dict[str | None, str]:
        """Return every value of the teacher columns, with the name of its first sample. None stands for no column."""
        first_samples: dict[str | None, str] = {}
        for index, selected in zip(self._indexes, self._selected, strict=True):
            numbers = index.documents["teacher"][index.windows["document"][selected]]
            for first in np.sort(np.unique(numbers, return_index=True)[1]):
                window = int(selected[first])
                first_samples.setdefault(index.teacher(window), index.name(window))
        return first_samples


@dataclass(frozen=True)
class Corpus:
    """Training samples with their order, and held-out samples. Indices count within each of the two.

    fingerprint  hash of the training samples, independent of file names
    """

    train: Samples
    held_out: Samples
    order: SampleOrder
    sources: tuple[SourceCounts, ...]
    fingerprint: str

    @property
    def has_chats(self) -> bool:
        """Whether some source contains chats."""
        return any(source.is_chat for source in self.sources)


def unclosed_texts(sources: Sequence[SourceCounts], data: DataConfig) -> list[str]:
    """Return a warning if the student is not taught to stop after the completions of texts with a masked prompt."""
    names = ", ".join(source.name for source in sources if source.has_prompt)
    if not names or data.close_documents:
        return []
    return [
        f"warning: {names}: no EOS follows the completions, so that the student does not learn to stop after them: set "
        "data.close_documents = true to append EOS to the texts and to train on it"
    ]


def load_corpus(data: DataConfig, evaluation: EvalConfig, vocabulary: Vocabulary, seed: int) -> Corpus:
    """Index every source, draw the held-out documents, and select the samples.

    Raises DataError for a source that cannot be read or has no window to train on.
    """
    indexes: list[WindowIndex] = []
    found = find_inputs(data.sources)
    for inputs in found:
        max_invalid = data.max_invalid - sum(index.summary.invalid for index in indexes)
        documents = [open_documents(path, inputs.source) for path in inputs.paths]
        _check_formats(inputs, documents)
        indexes.append(index_source(inputs.source, documents, vocabulary, data.window_tokens, max_invalid))
    held_documents = _draw_held_out([i.summary.documents for i in indexes], evaluation.held_out_documents, seed)
    _hold_out_together(found, indexes, held_documents)
    usable = [_usable_windows(index, data) for index in indexes]
    is_held = [held[i.windows["document"][u]] for i, held, u in zip(indexes, held_documents, usable, strict=True)]
    held_out = _draw_samples([u[h] for u, h in zip(usable, is_held, strict=True)], evaluation.max_samples, seed)
    train = _draw_samples([u[~h] for u, h in zip(usable, is_held, strict=True)], data.max_samples, seed)
    order = weighted_order([len(windows) for windows in train], [index.source.weight for index in indexes], seed)
    counts = tuple(_source_counts(*each) for each in zip(found, indexes, order.draws, strict=True))
    _check_samples(counts)
    closes = data.close_documents
    samples = (Samples(indexes, train, closes), Samples(indexes, held_out, closes))
    return Corpus(*samples, order, counts, _fingerprint(indexes, train, closes))


def _check_formats(inputs: SourceInputs, documents: Sequence[Documents]) -> None:
    """Raise DataError if the files of a source do not all have the record format of the first one."""
    first = documents[0].format
    for path, other in zip(inputs.paths, documents, strict=True):
        if (other.format.is_chat, other.format.is_whole) != (first.is_chat, first.is_whole):
            raise DataError(
                f"{inputs.paths[0]} has {first.description}, {path} has {other.format.description}: list them in "
                "separate [[data.sources]], or set record_format"
            )


def _check_samples(counts: Sequence[SourceCounts]) -> None:
    for source in counts:
        if not source.epoch_samples:
            raise DataError(
                f"{source.name}: no window of at least two tokens to train on, given its weight, data.max_samples and "
                "eval.held_out_documents"
            )


def _fingerprint(indexes: Sequence[WindowIndex], selected: Sequence[NDArray[np.int64]], closes: bool) -> str:
    digest = hashlib.sha256(f"{closes}".encode())
    for index, windows in zip(indexes, selected, strict=True):
        digest.update(f"{index.summary.fingerprint} {len(windows)}".encode() + windows.tobytes())
    return digest.hexdigest()


def _draw_held_out(documents: Sequence[int], num_held_out: int, seed: int) -> list[NDArray[np.bool_]]:
    """Draw the held-out documents from all sources together. Return a mask [documents] for each source."""
    total = sum(documents)
    if num_held_out and num_held_out >= total:
        raise DataError(f"eval.held_out_documents is {num_held_out}, but there are only {total} documents")
    held = np.zeros(total, dtype=bool)
    held[np.random.default_rng([seed, 0]).permutation(total)[:num_held_out]] = True
    return np.split(held, np.cumsum(documents)[:-1])


def _hold_out_together(
    found: Sequence[SourceInputs], indexes: Sequence[WindowIndex], held: Sequence[NDArray[np.bool_]]
) -> None:
    """Hold out the same lines and rows in all sources that read a file. Modifies `held`.

    A line or row is held out everywhere if at least one source holds it out.
    """
    readers: dict[Key, list[tuple[int, NDArray[np.int64]]]] = {}  # source, and its documents of one file
    for source, (inputs, index) in enumerate(zip(found, indexes, strict=True)):
        for number, key in enumerate(inputs.keys if len(found) > 1 else ()):
            readers.setdefault(key, []).append((source, np.flatnonzero(index.documents["input"] == number)))
    for same in readers.values():
        if len(same) > 1:
            offsets = [indexes[source].documents["offset"][documents] for source, documents in same]
            masks = [held[source][documents] for source, documents in same]
            held_offsets = np.concatenate([each[mask] for each, mask in zip(offsets, masks, strict=True)])
            for (source, documents), each in zip(same, offsets, strict=True):
                held[source][documents] |= np.isin(each, held_offsets)


def _usable_windows(index: WindowIndex, data: DataConfig) -> NDArray[np.int64]:
    """Select the windows with at least one token to predict, up to data.max_windows_per_document."""
    if index.format.is_chat:
        return np.arange(len(index.windows))
    closes = index.ends_document(np.arange(len(index.windows))) & data.close_documents
    usable = index.windows["tokens"] + closes >= 2
    if data.max_windows_per_document is not None:
        usable &= index.windows["number"] < data.max_windows_per_document
    return np.flatnonzero(usable)


def _draw_samples(windows: list[NDArray[np.int64]], limit: int | None, seed: int) -> list[NDArray[np.int64]]:
    """Draw at most `limit` windows from all sources together, and keep their order."""
    total = sum(map(len, windows))
    if limit is None or limit >= total:
        return windows
    drawn = np.zeros(total, dtype=bool)
    drawn[np.random.default_rng([seed, 1]).permutation(total)[:limit]] = True
    return [w[d] for w, d in zip(windows, np.split(drawn, np.cumsum([len(w) for w in windows])[:-1]), strict=True)]


def _source_counts(inputs: SourceInputs, index: WindowIndex, draws: int) -> SourceCounts:
    source, summary = index.source, index.summary
    return SourceCounts(
        name=source.name or source.dataset or ", ".join(Path(file).name for file in source.files),
        format=" and ".join(dict.fromkeys(documents.format.description for documents in index.inputs)),
        is_chat=index.format.is_chat,
        has_prompt=index.format.is_whole and not index.format.is_chat,
        documents=summary.documents,
        windows=summary.windows,
        tokens=None if index.format.is_chat else summary.tokens,
        num_bytes=summary.num_bytes,
        epoch_samples=draws,
        invalid=summary.invalid,
        first_invalid=tuple(summary.first_invalid[:MAX_NAMED_INVALID]),
        empty=summary.empty,
        repeated=inputs.repeated[:MAX_NAMED_REPEATED],
    )
