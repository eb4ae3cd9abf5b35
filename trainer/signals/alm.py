"""Signal `alm`: likelihoods of common spans (Approximate Likelihood Matching, arXiv 2503.20083). Texts only.

A span is the text between two neighboring common boundaries, at which both tokenizations end a token. The teacher's
log-probability of a span is the sum over its tokens in the span. The auxiliary loss compares it with the student's. No
mapping between the vocabularies is needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from alignment import Target, Tokens, Vocabulary
from alignment.byte_chain import ScoredRows, check_rows
from alignment.offsets import common_cuts
from alignment.report import AlignmentReport
from teachers.protocol.rows import Rows
from trainer.losses.span_loss import SpanLabels
from trainer.records import DistillationExample, TokenizedSample
from trainer.signals.base import Prepared
from trainer.signals.common_spans import complete_spans


@dataclass(frozen=True, eq=False)
class SpanLikelihoods:
    """The common spans of a text that the teacher scored completely, in order. C is their number.

    student    [C, 2] int64: begin and end of each span in student positions
    teacher    [C, 2] int64: begin and end in teacher tokens
    logprobs   [C] float64 nats: sum of the teacher's log-probabilities of its tokens in the span
    num_bytes  [C] int64 bytes of text (0 for a closing EOS)
    """

    student: NDArray[np.int64]
    teacher: NDArray[np.int64]
    logprobs: NDArray[np.float64]
    num_bytes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.logprobs)

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        return self.student.nbytes + self.teacher.nbytes + self.logprobs.nbytes + self.num_bytes.nbytes


class AlmSignal:
    """Match the likelihoods of common spans. An AuxiliarySignal."""

    fused: ClassVar[bool] = False
    supports_chats: ClassVar[bool] = False
    supports_masked: ClassVar[bool] = False

    def __init__(self, teacher: Vocabulary, student: Vocabulary, vocab_size: int, cache: Path) -> None:
        pass

    def prepare(self, rows: Rows, first_row: int, teacher: TokenizedSample, student: TokenizedSample) -> Prepared:
        """Sum log-probabilities over spans. Bits per byte in the report are those of the spans."""
        spans = span_likelihoods(rows, first_row, teacher.tokens, student.tokens)
        nats, num_bytes = float(spans.logprobs.sum()), int(spans.num_bytes.sum())
        valid = int(np.diff(spans.student).sum())
        report = AlignmentReport(len(student), valid, float("nan"), nats, float("nan"), num_bytes)
        return Prepared(Target.empty(len(student)), report, -float(rows.actual.mean(dtype=float)), spans)

    def close(self) -> None:
        """Do nothing: there is no cache."""

    @staticmethod
    def labels(examples: Sequence[DistillationExample], teacher: int, first_position: int, weight: float) -> SpanLabels:
        """Build labels from the spans at the supervised positions of all examples.

        A span of which some position is not supervised is left out.
        """
        columns = [(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32))]
        for example in examples:
            at = first_position + np.flatnonzero(example.supervised(first_position))
            offset_T, logprobs_T = np.full(len(at), -1), np.zeros(len(at), dtype=np.float32)
            spans = example.auxiliary[teacher]
            if isinstance(spans, SpanLikelihoods) and len(spans):
                begin, end = spans.student.T
                span_T = np.searchsorted(begin, at, side="right") - 1
                inside_T = (span_T >= 0) & (at < end[span_T])
                complete = np.bincount(span_T[inside_T], minlength=len(spans)) == end - begin
                inside_T &= complete[span_T]
                offset_T[inside_T] = (at - begin[span_T])[inside_T]
                logprobs_T[inside_T] = spans.logprobs[span_T][inside_T]
            columns.append((offset_T, logprobs_T))
        offset_T, logprobs_T = (np.concatenate(column) for column in zip(*columns, strict=True))
        return SpanLabels.from_numpy(offset_T, logprobs_T, weight)


def span_likelihoods(rows: ScoredRows, first_row: int, teacher: Tokens, student: Tokens) -> SpanLikelihoods:
    """Return the common spans of one sample with the teacher's log-probabilities.

    first_row  0 if the teacher sees BOS in front, otherwise 1

    A span that begins before the teacher's first row, or that contains bytes without a teacher token, is left out.
    Raises AlignmentError if the rows do not belong to these tokens or the texts differ.
    """
    check_rows(rows, first_row, teacher)
    cuts = common_cuts(teacher, student)
    complete = complete_spans(cuts, first_row, teacher)
    cumulative = np.concatenate([np.zeros(first_row + 1), np.cumsum(rows.actual, dtype=np.float64)])
    ranges = [np.stack([side[:-1], side[1:]], axis=1)[complete] for side in (cuts.student, cuts.teacher)]
    byte_at = np.minimum(cuts.at, student.num_bytes)
    return SpanLikelihoods(
        student=ranges[0],
        teacher=ranges[1],
        logprobs=cumulative[ranges[1][:, 1]] - cumulative[ranges[1][:, 0]],
        num_bytes=np.diff(byte_at)[complete],
    )
