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
    report          how much of the teacher's probability arrived
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

    fused            the signal yields a target, which is fused with those of the other teachers. Otherwise it is an
                     AuxiliarySignal with a term of its own in the loss
    supports_chats   the signal aligns chats, not only texts
    supports_masked  the signal leaves out masked rows (teachers.protocol.rows.Rows)
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
    """A signal with a loss of its own. Its prepared rows have `auxiliary` scores."""

    @staticmethod
    def labels(
        examples: Sequence[DistillationExample], teacher: int, first_position: int, weight: float
    ) -> AuxiliaryLabels:
        """Build the labels of the supervised positions of all examples, from the student's first predicted position on.

        `teacher` is the teacher's index in the run file, weight its share of the total teacher weight.
        """
        ...
