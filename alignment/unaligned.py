"""What a teacher can teach where its tokens are not translated: likelihoods of common spans, and sorted probabilities.

Both need only a top-k answer and no correspondence of vocabularies. Spans are what ALM matches (Approximate Likelihood
Matching, arXiv 2503.20083): the shortest stretches of text that both tokenizations cut out, each with the sum of the
teacher's log-probabilities of what stands there. Sorted probabilities are what ULD compares (Universal Logit
Distillation, arXiv 2402.12030): how a row's mass is spread, whatever its tokens are called.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alignment.chain import Rows, check_rows, gaps
from alignment.spans import Cuts, Tokens, common_cuts


@dataclass(frozen=True, eq=False)
class SpanLikelihoods:
    """C spans of text that a teacher has spoken of from beginning to end, in order.

    student    [C, 2] int64: student positions, from and up to
    teacher    [C, 2] int64: teacher tokens, likewise
    logprobs   [C] float64 nats: sum of the teacher's log-probabilities of its tokens there
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
        return self.student.nbytes + self.teacher.nbytes + self.logprobs.nbytes + self.num_bytes.nbytes


@dataclass(frozen=True, eq=False)
class SortedProbs:
    """P student positions at which both models have read the same text, and the teacher's row there.

    positions  [P] int64 student positions
    probs      [P, K] float32 the K largest probabilities, in descending order. The actual token counts where it is one
               of them: of another one the rank is not known
    tail       [P] float32: what the row does not list
    """

    positions: NDArray[np.int64]
    probs: NDArray[np.float32]
    tail: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def nbytes(self) -> int:
        return self.positions.nbytes + self.probs.nbytes + self.tail.nbytes


def span_likelihoods(rows: Rows, first_row: int, teacher: Tokens, student: Tokens) -> SpanLikelihoods:
    """The spans of one sample. first_row: 0 where the teacher saw a BOS, 1 where nothing stood before its first token.

    A span that begins before the teacher's first row is left out, as is one of which some bytes are in no token.
    Raises AlignmentError if the rows are not those of these tokens or the texts differ.
    """
    check_rows(rows, first_row, teacher)
    cuts = common_cuts(teacher, student)
    spoken = _spoken(cuts, first_row, teacher)
    before = np.concatenate([np.zeros(first_row + 1), np.cumsum(rows.actual, dtype=np.float64)])
    begin_end = [np.stack([side[:-1], side[1:]], axis=1)[spoken] for side in (cuts.student, cuts.teacher)]
    byte_at = np.minimum(cuts.at, student.num_bytes)
    return SpanLikelihoods(
        student=begin_end[0],
        teacher=begin_end[1],
        logprobs=before[begin_end[1][:, 1]] - before[begin_end[1][:, 0]],
        num_bytes=np.diff(byte_at)[spoken],
    )


def sorted_probs(rows: Rows, first_row: int, teacher: Tokens, student: Tokens) -> SortedProbs:
    """The rows at the beginnings of the same spans, without their ids. Raises AlignmentError as above."""
    check_rows(rows, first_row, teacher)
    cuts = common_cuts(teacher, student)
    spoken = _spoken(cuts, first_row, teacher)
    row = cuts.teacher[:-1][spoken] - first_row
    probs = -np.sort(-np.exp(rows.logprobs[row], dtype=np.float64), axis=1)
    tail = np.maximum(1.0 - probs.sum(axis=1), 0.0)
    return SortedProbs(cuts.student[:-1][spoken], probs.astype(np.float32), tail.astype(np.float32))


def _spoken(cuts: Cuts, first_row: int, teacher: Tokens) -> NDArray[np.bool_]:
    """[B] blocks with tokens on both sides of which the teacher has said everything."""
    filled = (np.diff(cuts.teacher) > 0) & (np.diff(cuts.student) > 0)
    whole: NDArray[np.bool_] = filled & (cuts.teacher[:-1] >= first_row) & ~gaps(cuts, teacher)
    return whole
