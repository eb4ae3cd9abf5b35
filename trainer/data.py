"""Samples: windows of text, cut so that every model can see each one whole, in an order that a seed decides."""

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alignment import Vocabulary
from trainer.config import DataConfig, EvalConfig, find_data
from trainer.errors import DataError


@dataclass(frozen=True)
class Sample:
    """One window. `name` says where it came from; `closes` whether EOS follows."""

    index: int
    name: str
    text: str
    closes: bool = False
    written_by: int | None = None  # version of the student's weights, for text that it wrote itself


@dataclass(frozen=True)
class Corpus:
    """What is trained on and what is held out; indices count within each."""

    train: tuple[Sample, ...]
    held_out: tuple[Sample, ...]


def load_corpus(data: DataConfig, evaluation: EvalConfig, vocabulary: Vocabulary, seed: int) -> Corpus:
    """Read, set held-out documents aside, cut into windows. Raises DataError for texts that cannot be used."""
    documents = [doc for name in data.files for doc in read_documents(find_data(name), data.text_column)]
    num_held_out = evaluation.held_out_documents
    if num_held_out and num_held_out >= len(documents):
        raise DataError(f"eval.held_out_documents is {num_held_out}, but there are only {len(documents)} documents")
    order = np.random.default_rng([seed, 0]).permutation(len(documents))
    held_out = _windows([documents[i] for i in sorted(order[:num_held_out])], data, vocabulary)
    train = _windows([documents[i] for i in sorted(order[num_held_out:])], data, vocabulary)
    if not train:
        raise DataError(f"{', '.join(data.files)}: no window of at least two tokens to train on")
    return Corpus(_draw(train, data.max_samples, seed), _draw(held_out, evaluation.max_samples, seed))


def read_documents(path: Path, text_column: str) -> Iterator[tuple[str, str]]:
    """(name, text) of each document in a file. Raises DataError if it is empty, not UTF-8, or a line is broken."""
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if not text:
        raise DataError(f"{path} is empty: give a text of at least one byte")
    if path.suffix != ".jsonl":
        yield path.name, text
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)[text_column]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number}: expected a JSON object with a {text_column!r} string") from error
        if not isinstance(document, str):
            raise DataError(f"{path}, line {number}: {text_column!r} is {type(document).__name__}, expected a string")
        try:
            document.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{path}, line {number}: character {error.start} is half of a surrogate pair") from error
        if document:
            yield f"{path.name}:{number}", document


def cut_windows(text: str, vocabulary: Vocabulary, window_tokens: int) -> Iterator[str]:
    """Pieces of the text, in order and without gaps, each at most `window_tokens` tokens long when read alone."""
    data = text.encode()
    ends = vocabulary.encode(text).ends
    whole = [i for i, end in enumerate(ends.tolist()) if end > 0 and _is_character_end(data, end)]
    begin = first = at = 0  # the window's first byte, first token and first possible cut
    while begin < len(data) and at < len(whole):
        cut = max(bisect_right(whole, first + window_tokens - 1) - 1, at)
        piece = data[begin : ends[whole[cut]]].decode()
        while cut > at and len(vocabulary.encode(piece)) > window_tokens:
            cut -= 1
            piece = data[begin : ends[whole[cut]]].decode()
        yield piece
        begin, first, at = int(ends[whole[cut]]), whole[cut] + 1, cut + 1
    if begin < len(data):  # text at the end that the tokenizer has no token for
        yield data[begin:].decode()


def _is_character_end(data: bytes, end: int) -> bool:
    return end == len(data) or data[end] & 0xC0 != 0x80


def _windows(documents: Sequence[tuple[str, str]], data: DataConfig, vocabulary: Vocabulary) -> list[Sample]:
    samples: list[Sample] = []
    for name, text in documents:
        pieces = list(cut_windows(text, vocabulary, data.window_tokens))
        for i, piece in enumerate(pieces[: data.max_windows_per_document]):
            closes = data.close_documents and i == len(pieces) - 1
            if len(vocabulary.encode(piece)) + closes >= 2:
                samples.append(Sample(len(samples), f"{name}#{i}", piece, closes))
    return samples


def _draw(samples: list[Sample], limit: int | None, seed: int) -> tuple[Sample, ...]:
    if limit is None or limit >= len(samples):
        return tuple(samples)
    chosen = np.sort(np.random.default_rng([seed, 1]).permutation(len(samples))[:limit])
    return tuple(Sample(n, samples[i].name, samples[i].text, samples[i].closes) for n, i in enumerate(chosen.tolist()))


def batch_indices(num_samples: int, batch_samples: int, seed: int, step: int) -> list[int]:
    """Sample indices of one step: a function of (seed, epoch, offset) alone, so a run can resume anywhere.

    Epochs follow one another without a gap; a batch may hold the end of one and the beginning of the next.
    """
    consumed = range(step * batch_samples, (step + 1) * batch_samples)
    orders = {n // num_samples: None for n in consumed}
    permutations = {epoch: np.random.default_rng([seed, 2, epoch]).permutation(num_samples) for epoch in orders}
    return [int(permutations[n // num_samples][n % num_samples]) for n in consumed]
