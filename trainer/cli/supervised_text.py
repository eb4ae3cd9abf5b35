"""Samples as one model receives them, with the supervised text marked, for `tutelage doctor`."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from trainer.plain_text import printable
from trainer.records import TokenizedSample

MAX_SUPERVISED, MAX_OTHER = 600, 160  # characters of a stretch that are shown


@dataclass(frozen=True)
class SupervisedText:
    """The text of a sample.

    model   "student", or "teacher" and its name
    sample  name of the sample
    text    the whole text; for a chat, as the model's template renders it
    spans   characters [start, stop) of the supervised tokens, in order
    """

    model: str
    sample: str
    text: str
    spans: tuple[tuple[int, int], ...]

    def marked(self, before: str, after: str) -> str:
        """Return the text on one line with marks around the supervised spans. Long stretches are shortened."""
        shown, at = "", 0
        for start, stop in self.spans:
            shown += _shortened(self.text[at:start], MAX_OTHER)
            shown += f"{before}{_shortened(self.text[start:stop], MAX_SUPERVISED)}{after}"
            at = stop
        return shown + _shortened(self.text[at:], MAX_OTHER)


def supervised_text(model: str, sample: str, tokenized: TokenizedSample) -> SupervisedText:
    """Return the text of a tokenized sample with its supervised spans."""
    data = tokenized.tokens.text
    return SupervisedText(model, sample, data.decode(), tuple(_characters(data, _byte_spans(tokenized))))


def _byte_spans(tokenized: TokenizedSample) -> list[tuple[int, int]]:
    """Return the bytes of each run of supervised tokens."""
    tokens, supervised_T = tokenized.tokens, tokenized.supervised_T
    reached = np.maximum.accumulate(np.minimum(tokens.ends, tokens.num_bytes).clip(min=0))
    edges = np.flatnonzero(np.diff(np.concatenate([[False], supervised_T, [False]]))).reshape(-1, 2)
    starts = np.concatenate([[0], reached])
    return [(int(starts[begin]), int(reached[end - 1])) for begin, end in edges.tolist()]


def _characters(data: bytes, spans: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Convert spans of bytes to spans of characters. A character of which a span has only a part is left out."""
    for start, stop in spans:
        yield len(data[:start].decode(errors="ignore")), len(data[:stop].decode(errors="ignore"))


def _shortened(text: str, limit: int) -> str:
    half = limit // 2
    return printable(text if len(text) <= limit else f"{text[:half]} … {text[-half:]}")
