"""How much of a teacher arrives: coverage, listed mass, and bits per byte before and after alignment."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alignment.chain import Rows, cuts_between
from alignment.spans import Cuts, Tokens
from alignment.target import Target
from alignment.translation import Translation


@dataclass(frozen=True)
class BlockLikelihoods:
    """Log-likelihood of the text, block by block, over the blocks that are valid throughout.

    teacher, student  [B] nats: the teacher's own, and that of its aligned target (−inf where the text is unlisted)
    num_bytes         [B] bytes of text in each block (0 for a closing EOS)
    """

    teacher: NDArray[np.float64]
    student: NDArray[np.float64]
    num_bytes: NDArray[np.int64]


@dataclass(frozen=True)
class AlignmentReport:
    """Sums over samples; add reports with `+`. Bits per byte are over the same bytes on both sides."""

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
        return bits_per_byte(self.teacher_nats, self.num_bytes)

    @property
    def aligned_bpb(self) -> float:
        return bits_per_byte(self.aligned_nats, self.num_bytes)

    @property
    def mean_mass(self) -> float:
        return self.mass / self.valid if self.valid else math.nan


def bits_per_byte(logprob_nats: float, num_bytes: int) -> float:
    """−log2 P / bytes; nan where there is no text."""
    return -logprob_nats / math.log(2) / num_bytes if num_bytes else math.nan


def block_likelihoods(
    rows: Rows, first_row: int, tokens: tuple[Tokens, Tokens], target: Target, cuts: Cuts
) -> BlockLikelihoods:
    """Compare teacher and target over every block whose positions are all valid and whose rows are all there."""
    student = tokens[1]
    num_blocks = len(cuts.at) - 1
    of_teacher = np.repeat(np.arange(num_blocks), np.diff(cuts.teacher))
    of_student = np.repeat(np.arange(num_blocks), np.diff(cuts.student))
    whole = np.bincount(of_student, weights=~target.valid, minlength=num_blocks) == 0
    whole &= (cuts.teacher[:-1] >= first_row) & (np.diff(cuts.student) > 0)
    own = np.concatenate([np.zeros(first_row), rows.actual.astype(np.float64)])
    with np.errstate(divide="ignore"):
        aligned = np.log(target.prob_of(student.ids))
    byte_at = np.minimum(cuts.at, student.num_bytes)
    return BlockLikelihoods(
        teacher=np.bincount(of_teacher, weights=own, minlength=num_blocks)[whole],
        student=np.bincount(of_student, weights=aligned, minlength=num_blocks)[whole],
        num_bytes=np.diff(byte_at)[whole],
    )


def report(
    rows: Rows, first_row: int, tokens: tuple[Tokens, Tokens], target: Target, translation: Translation
) -> AlignmentReport:
    """The figures of one sample."""
    blocks = block_likelihoods(rows, first_row, tokens, target, cuts_between(*tokens, translation))
    return AlignmentReport(
        positions=len(target),
        valid=int(target.valid.sum()),
        mass=float(target.mass.sum()),
        teacher_nats=float(blocks.teacher.sum()),
        aligned_nats=float(blocks.student.sum()),
        num_bytes=int(blocks.num_bytes.sum()),
    )
