"""Signal `uld`: sorted probabilities (Universal Logit Distillation, arXiv 2402.12030). Texts only.

At positions where teacher and student have read the same text, the auxiliary loss compares how the two distributions
spread their mass, in sorted order, regardless of which tokens carry it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from alignment import Target, Tokens, Vocabulary
from alignment.byte_chain import ScoredRows, check_rows
from alignment.offsets import common_cuts
from alignment.report import AlignmentReport
from teachers.protocol.rows import Rows
from trainer.losses.sorted_probs_loss import SortedProbsLabels
from trainer.records import DistillationExample, TokenizedSample
from trainer.signals.alm import span_likelihoods
from trainer.signals.base import Prepared
from trainer.signals.common_spans import complete_spans


@dataclass(frozen=True, eq=False)
class SortedProbs:
    """The teacher's sorted probabilities at the P positions at which both models have read the same text.

    positions  [P] int64 indices of these positions among the student's tokens
    probs      [P, K] float32: the K largest probabilities in descending order. The actual token is included if it is
               among them; its rank is unknown otherwise
    tail       [P] float32: probability outside the K largest
    """

    positions: NDArray[np.int64]
    probs: NDArray[np.float32]
    tail: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        return self.positions.nbytes + self.probs.nbytes + self.tail.nbytes


class UldSignal:
    """Match sorted probabilities. An AuxiliarySignal."""

    fused: ClassVar[bool] = False
    supports_chats: ClassVar[bool] = False
    supports_masked: ClassVar[bool] = False

    def __init__(self, teacher: Vocabulary, student: Vocabulary, vocab_size: int, cache: Path) -> None:
        pass

    def prepare(self, rows: Rows, first_row: int, teacher: TokenizedSample, student: TokenizedSample) -> Prepared:
        """Sort the probabilities of rows at common boundaries. Bits per byte in the report are those of the spans."""
        probs = sorted_probs(rows, first_row, teacher.tokens, student.tokens)
        spans = span_likelihoods(rows, first_row, teacher.tokens, student.tokens)
        nats, num_bytes = float(spans.logprobs.sum()), int(spans.num_bytes.sum())
        mass = float(probs.probs.sum(dtype=float))
        report = AlignmentReport(len(student), len(probs), mass, nats, float("nan"), num_bytes)
        return Prepared(Target.empty(len(student)), report, -float(rows.actual.mean(dtype=float)), probs)

    def close(self) -> None:
        """Do nothing: there is no cache."""

    @staticmethod
    def labels(
        examples: Sequence[DistillationExample], teacher: int, first_position: int, weight: float
    ) -> SortedProbsLabels:
        """Build labels from the sorted probabilities at the supervised positions of all examples."""
        scores = [example.auxiliary[teacher] for example in examples]
        top_k = max([1, *(probs.probs.shape[1] for probs in scores if isinstance(probs, SortedProbs))])
        columns = [(np.zeros((0, top_k), dtype=np.float32), np.zeros(0, dtype=np.float32))]
        for example, probs in zip(examples, scores, strict=True):
            num_positions = len(example.tokenized)
            probs_TK = np.zeros((num_positions, top_k), dtype=np.float32)
            tail_T = np.zeros(num_positions, dtype=np.float32)
            if isinstance(probs, SortedProbs):
                probs_TK[probs.positions, : probs.probs.shape[1]] = probs.probs
                tail_T[probs.positions] = probs.tail
            supervised = example.supervised(first_position)
            columns.append((probs_TK[first_position:][supervised], tail_T[first_position:][supervised]))
        probs_TK, tail_T = (np.concatenate(column) for column in zip(*columns, strict=True))
        return SortedProbsLabels(torch.from_numpy(probs_TK), torch.from_numpy(tail_T), weight)


def sorted_probs(rows: ScoredRows, first_row: int, teacher: Tokens, student: Tokens) -> SortedProbs:
    """Return the sorted probabilities at the beginnings of common spans. Raises AlignmentError as span_likelihoods."""
    check_rows(rows, first_row, teacher)
    cuts = common_cuts(teacher, student)
    complete = complete_spans(cuts, first_row, teacher)
    row = cuts.teacher[:-1][complete] - first_row
    probs = -np.sort(-np.exp(rows.logprobs[row], dtype=np.float64), axis=1)
    tail = np.maximum(1.0 - probs.sum(axis=1), 0.0)
    return SortedProbs(cuts.student[:-1][complete], probs.astype(np.float32), tail.astype(np.float32))
