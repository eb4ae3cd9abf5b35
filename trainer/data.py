"""Samples: chats, and windows of text that every model can see whole, in an order that a seed decides."""

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from alignment import Tokens, Vocabulary
from trainer.config import DataConfig, EvalConfig, find_data
from trainer.errors import DataError

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Document:
    """One text or chat of a file, `domain` and `teacher` as its columns say."""

    name: str
    text: str = ""
    messages: tuple[Message, ...] = ()
    tools: tuple[Message, ...] = ()
    domain: str = ""
    teacher: str | None = None


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
class Corpus:
    """What is trained on and what is held out; indices count within each."""

    train: tuple[Sample, ...]
    held_out: tuple[Sample, ...]


def load_corpus(data: DataConfig, evaluation: EvalConfig, vocabulary: Vocabulary, seed: int) -> Corpus:
    """Read, set held-out documents aside, cut into windows. Raises DataError for texts that cannot be used."""
    documents = [document for name in data.files for document in read_documents(find_data(name), data)]
    num_held_out = evaluation.held_out_documents
    if num_held_out and num_held_out >= len(documents):
        raise DataError(f"eval.held_out_documents is {num_held_out}, but there are only {len(documents)} documents")
    order = np.random.default_rng([seed, 0]).permutation(len(documents))
    held_out = _windows([documents[i] for i in sorted(order[:num_held_out])], data, vocabulary)
    train = _windows([documents[i] for i in sorted(order[num_held_out:])], data, vocabulary)
    if not train:
        raise DataError(f"{', '.join(data.files)}: no window of at least two tokens to train on")
    return Corpus(_draw(train, data.max_samples, seed), _draw(held_out, evaluation.max_samples, seed))


def read_documents(path: Path, columns: DataConfig) -> Iterator[Document]:
    """The documents of a file. Raises DataError if it is empty, not UTF-8, or a line is broken."""
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if not text:
        raise DataError(f"{path} is empty: give a text of at least one byte")
    if path.suffix != ".jsonl":
        if columns.messages_column or columns.teacher_column:
            raise DataError(f"{path} has no columns: chats and teachers' names come from .jsonl files")
        yield Document(path.name, text, domain=path.name)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            document = _Line(f"{path}, line {number}", line).document(f"{path.name}:{number}", path.name, columns)
            if document.text or document.messages:
                yield document


class _Line:
    """One line of a .jsonl file, each value checked as it is taken."""

    def __init__(self, where: str, line: str) -> None:
        self._where = where
        try:
            self._values = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: expected a JSON object, received {line[:40]!r}") from error
        if not isinstance(self._values, dict):
            raise DataError(f"{where}: expected a JSON object, received {type(self._values).__name__}")

    def document(self, name: str, file: str, columns: DataConfig) -> Document:
        return Document(
            name,
            text="" if columns.messages_column else self._string(columns.text_column),
            messages=self._objects(columns.messages_column) if columns.messages_column else (),
            tools=self._objects("tools") if columns.messages_column and self._values.get("tools") else (),
            domain=self._string(columns.domain_column) if columns.domain_column else file,
            teacher=self._string(columns.teacher_column) if columns.teacher_column else None,
        )

    def _string(self, column: str) -> str:
        value = self._values.get(column)
        if not isinstance(value, str):
            raise DataError(f"{self._where}: {column!r} is {_kind(value)}, expected a string")
        self._check(value)
        return value

    def _objects(self, column: str) -> tuple[Message, ...]:
        value = self._values.get(column)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise DataError(f"{self._where}: {column!r} is {_kind(value)}, expected a list of objects")
        self._check(json.dumps(value, ensure_ascii=False))
        return tuple(value)

    def _check(self, text: str) -> None:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{self._where}: character {error.start} is half of a surrogate pair") from error


def _kind(value: object) -> str:
    return "absent" if value is None else type(value).__name__


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


def _windows(documents: Sequence[Document], data: DataConfig, vocabulary: Vocabulary) -> list[Sample]:
    samples: list[Sample] = []
    for document in documents:
        name, domain, teacher = document.name, document.domain, document.teacher
        if document.messages:
            messages, tools = document.messages, document.tools
            samples.append(Sample(len(samples), name, messages=messages, tools=tools, domain=domain, teacher=teacher))
            continue
        pieces = list(cut_windows(document.text, vocabulary, data.window_tokens))
        for i, piece in enumerate(pieces[: data.max_windows_per_document]):
            closes = data.close_documents and i == len(pieces) - 1
            if len(vocabulary.encode(piece)) + closes >= 2:
                samples.append(Sample(len(samples), f"{name}#{i}", piece, closes, domain=domain, teacher=teacher))
    return samples


def _draw(samples: list[Sample], limit: int | None, seed: int) -> tuple[Sample, ...]:
    if limit is None or limit >= len(samples):
        return tuple(samples)
    chosen = np.sort(np.random.default_rng([seed, 1]).permutation(len(samples))[:limit])
    return tuple(replace(samples[i], index=n) for n, i in enumerate(chosen.tolist()))


def batch_indices(num_samples: int, batch_samples: int, seed: int, step: int) -> list[int]:
    """Sample indices of one step: a function of (seed, epoch, offset) alone, so a run can resume anywhere.

    Epochs follow one another without a gap; a batch may hold the end of one and the beginning of the next.
    """
    consumed = range(step * batch_samples, (step + 1) * batch_samples)
    orders = {n // num_samples: None for n in consumed}
    permutations = {epoch: np.random.default_rng([seed, 2, epoch]).permutation(num_samples) for epoch in orders}
    return [int(permutations[n // num_samples][n % num_samples]) for n in consumed]
