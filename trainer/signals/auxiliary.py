"""Auxiliary losses of one step: teachers whose signal is not fused, their weights, and their labels."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

from trainer.losses.labels import AuxiliaryLabels, Labels
from trainer.query.config import TeacherConfig
from trainer.records import DistillationExample
from trainer.signals import signal_class
from trainer.signals.base import AuxiliarySignal


@dataclass(frozen=True)
class AuxiliaryLoss:
    """The loss of one teacher whose signal is not fused.

    index   position of the teacher in the run file
    weight  part of the distillation loss, relative to all teachers
    """

    index: int
    name: str
    signal: str
    weight: float


def auxiliary_losses(
    teachers: Sequence[TeacherConfig], teacher_weights_N: Sequence[float]
) -> tuple[AuxiliaryLoss, ...]:
    """Return the auxiliary losses in the order of the run file. The weights of all teachers sum to 1."""
    return tuple(
        AuxiliaryLoss(i, teacher.name, teacher.signal, float(weight))
        for i, (teacher, weight) in enumerate(zip(teachers, teacher_weights_N, strict=True))
        if not teacher.is_fused
    )


def fused_weight(teachers: Sequence[TeacherConfig], teacher_weights_N: Sequence[float]) -> float:
    """Return the fused target's weight in the distillation loss: 1 if no teacher has a loss term of its own."""
    fused = [float(w) for teacher, w in zip(teachers, teacher_weights_N, strict=True) if teacher.is_fused]
    return 1.0 if len(fused) == len(teachers) else sum(fused)


def with_auxiliary(
    labels: Labels, examples: Sequence[DistillationExample], losses: Sequence[AuxiliaryLoss], first_position: int
) -> Labels:
    """Return the labels of all examples' supervised positions with those of the auxiliary losses, in their order."""
    return replace(labels, auxiliary=tuple(_labels(examples, loss, first_position) for loss in losses))


def _labels(examples: Sequence[DistillationExample], loss: AuxiliaryLoss, first_position: int) -> AuxiliaryLabels:
    signal = signal_class(loss.signal)
    return cast(type[AuxiliarySignal], signal).labels(examples, loss.index, first_position, loss.weight)
