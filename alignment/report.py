"""How much of a teacher's knowledge a target contains: coverage, listed mass, bits per byte before and after."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alignment.byte_chain import ScoredRows, block_cuts
from alignment.offsets import Cuts, Tokens
from alignment.target import Target
from alignment.translation import Translation


@dataclass(frozen=True)
class BlockLikelihoods:
    """Log-likelihood of the text per block, over the blocks whose positions are all valid.

    teacher    [B] nats, of the teacher
    student    [B] nats, of the aligned target; −inf if the target does not list the text
    num_bytes  [B] bytes of text in each block (0 for a closing EOS)
    """

    teacher: NDArray[np.float64]
    student: NDArray[np.float64]
    num_bytes: NDArray[np.int64]


@dataclass(frozen=True)
class AlignmentReport:
    """Sums over samples. Reports can be added. Teacher and target are compared on the same bytes of text.

    positions     student positions
    valid         positions with a target
    mass          sum of the listed probability over valid positions
    teacher_nats  log-likelihood of the text by the teacher
    aligned_nats  log-likelihood of the text by the target
    num_bytes     bytes of text that both log-likelihoods cover
    """

    positions: int = 0
    valid: int = 0
    mass: float = 0.0
    teacher_nats: float = 0.0
    aligned_nats: float = 0.0
    num_bytes: int = 0

    def __add__(self, other: "AlignmentReport") -> "AlignmentReport":
        return AlignmentReport(
            self.positions + other.positions,
            self.valid + other.valid,
            self.mass + other.mass,
            self.teacher_nats + other.teacher_nats,
            self.aligned_nats + other.aligned_nats,
            self.num_bytes + other.num_bytes,
        )

    @property
    def teacher_bpb(self) -> float:
        """Bits per byte of the teacher."""
        return bits_per_byte(self.teacher_nats, self.num_bytes)

    @property
    def aligned_bpb(self) -> float:
        """Bits per byte of the aligned target."""
        return bits_per_byte(self.aligned_nats, self.num_bytes)

    @property
    def mean_mass(self) -> float:
        """Mean listed probability of the valid positions; nan if there are none."""
        return self.mass / self.valid if self.valid else math.nan


def bits_per_byte(logprob_nats: float, num_bytes: int) -> float:
    """Return −log2 P / bytes; nan if there is no text."""
    return -logprob_nats / math.log(2) / num_bytes if num_bytes else math.nan


def block_likelihoods(
    rows: ScoredRows, first_row: int, tokens: tuple[Tokens, Tokens], target: Target, cuts: Cuts
) -> BlockLikelihoods:
    """Compare teacher and target over every block whose positions are all valid and whose rows are all present."""
    student = tokens[1]
    num_blocks = len(cuts.at) - 1
    block_of_teacher = np.repeat(np.arange(num_blocks), np.diff(cuts.teacher))
    block_of_student = np.repeat(np.arange(num_blocks), np.diff(cuts.student))
    complete = np.bincount(block_of_student, weights=~target.valid, minlength=num_blocks) == 0
    complete &= (cuts.teacher[:-1] >= first_row) & (np.diff(cuts.student) > 0)
    teacher_nats = np.concatenate([np.zeros(first_row), rows.actual.astype(np.float64)])
    with np.errstate(divide="ignore"):
        aligned_nats = np.log(target.prob_of(student.ids))
    byte_at = np.minimum(cuts.at, student.num_bytes)
    return BlockLikelihoods(
        teacher=np.bincount(block_of_teacher, weights=teacher_nats, minlength=num_blocks)[complete],
        student=np.bincount(block_of_student, weights=aligned_nats, minlength=num_blocks)[complete],
        num_bytes=np.diff(byte_at)[complete],
    )


def report(
    rows: ScoredRows, first_row: int, tokens: tuple[Tokens, Tokens], target: Target, translation: Translation
) -> AlignmentReport:
    """Compute the report of one sample. `tokens` are the teacher's and the student's."""
    blocks = block_likelihoods(rows, first_row, tokens, target, block_cuts(*tokens, translation))
    return AlignmentReport(
        positions=len(target),
        valid=int(target.valid.sum()),
        mass=float(target.mass.sum()),
        teacher_nats=float(blocks.teacher.sum()),
        aligned_nats=float(blocks.student.sum()),
        num_bytes=int(blocks.num_bytes.sum()),
    )
