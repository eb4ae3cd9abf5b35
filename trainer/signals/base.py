"""The protocol of a teacher signal: how one teacher's rows become a target, or an auxiliary loss."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, NamedTuple, Protocol

from alignment import Target, Vocabulary
from alignment.report import AlignmentReport
from teachers.protocol.rows import Rows
from trainer.losses.labels import AuxiliaryLabels
from trainer.records import AuxiliaryScores, DistillationExample, TokenizedSample


class Prepared(NamedTuple):
    """One teacher's rows for one sample, ready for fusion or for an auxiliary loss.

    target          distributions over the student's tokens; no valid position if the signal is not fused
    report          coverage, listed mass and bits per byte of the alignment
    nats_per_token  mean negative log-likelihood of the teacher's supervised tokens; inf without any
    auxiliary       scores of a signal that is not fused
    unaligned       supervised positions of a chat without a target, by reason (trainer/chats/span_pairs.py)
    """

    target: Target
    report: AlignmentReport
    nats_per_token: float
    auxiliary: AuxiliaryScores | None = None
    unaligned: Mapping[str, int] = MappingProxyType({})


class TeacherSignal(Protocol):
    """The signal of one connected teacher.

    fused            whether `prepare` returns a target that is fused with the targets of the other teachers. A signal
                     that is not fused is an AuxiliarySignal and adds its own term to the loss
    supports_chats   whether the signal can align chats
    supports_masked  whether the signal accepts masked rows (teachers.protocol.rows.Rows), which it leaves out
    """

    fused: ClassVar[bool]
    supports_chats: ClassVar[bool]
    supports_masked: ClassVar[bool]

    def __init__(self, teacher: Vocabulary, student: Vocabulary, vocab_size: int, cache: Path) -> None:
        """Build or load from `cache` what alignment needs. vocab_size is the teacher model's number of ids."""
        ...

    def prepare(self, rows: Rows, first_row: int, teacher: TokenizedSample, student: TokenizedSample) -> Prepared:
        """Align the rows of one sample. Runs on a thread beside the training step.

        first_row is the teacher token that the first row predicts: 0 if the teacher sees BOS in front, otherwise 1.
        Raises AlignmentError if rows and tokens do not belong together.
        """
        ...

    def close(self) -> None:
        """Write caches."""
        ...


class AuxiliarySignal(TeacherSignal, Protocol):
    """A signal that adds its own term to the loss. `prepare` returns `auxiliary` scores instead of a target."""

    @staticmethod
    def labels(
        examples: Sequence[DistillationExample], teacher: int, first_position: int, weight: float
    ) -> AuxiliaryLabels:
        """Build the labels of the supervised positions of all examples, from the student's first predicted position on.

        `teacher` is the teacher's index in the run file, weight its share of the total teacher weight.
        """
        ...
