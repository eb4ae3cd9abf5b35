"""What the metrics file is told of a step: the whole batch, whichever ranks had its parts, and what it cost."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignment.report import AlignmentReport
from trainer.learning.step import StepResult
from trainer.targets.pipeline import Batch, labels_of


@dataclass(frozen=True)
class TeacherPart:
    """What a teacher gave to a rank's lessons: its shares and misses summed, and how its replicas did until then."""

    report: AlignmentReport
    share: float
    left_out: int
    absent: int
    waited_s: float
    fleet: Mapping[str, float]


@dataclass(frozen=True)
class BatchPart:
    """One rank's part of a batch, summed: positions to predict, those with a target, its listed mass and tail there."""

    lessons: int
    positions: int
    valid: int
    mass: float
    tail: float
    vanished: int
    shortened: int
    skipped: int
    folded_system: int
    times: Mapping[str, float]
    teachers: tuple[TeacherPart, ...]


def part_of(batch: Batch, teachers: Sequence[str], first_position: int) -> BatchPart:
    """What this rank has of it."""
    lessons = batch.lessons
    targets = [target for _, target in (labels_of(lesson, first_position) for lesson in lessons) if target is not None]
    return BatchPart(
        lessons=len(lessons),
        positions=sum(len(target) for target in targets),
        valid=sum(int(target.valid.sum()) for target in targets),
        mass=sum(float(target.mass.sum()) for target in targets),
        tail=sum(float(target.tail.sum()) for target in targets),
        vanished=sum(lesson.vanished for lesson in lessons),
        shortened=sum(lesson.shortened for lesson in lessons),
        skipped=batch.num_skipped,
        folded_system=sum(r.folded_system for r in (lesson.reading.rendered for lesson in lessons) if r is not None),
        times=batch.times,
        teachers=tuple(
            TeacherPart(
                report=sum((lesson.reports[i] for lesson in lessons), AlignmentReport()),
                share=sum(lesson.shares[i] for lesson in lessons),
                left_out=sum(lesson.left_out[i] for lesson in lessons),
                absent=sum(lesson.absent[i] for lesson in lessons),
                waited_s=batch.waited_on.get(name, 0.0),
                fleet=batch.fleets.get(name, {}),
            )
            for i, name in enumerate(teachers)
        ),
    )


def step_values(
    parts: Sequence[BatchPart], teachers: Sequence[str], result: StepResult, step_s: float
) -> dict[str, Any]:
    """One step in figures. Its times are those of the rank that waited longest, its fleets those of the first."""
    slowest = max(parts, key=lambda part: part.times["waited_s"])
    values: dict[str, Any] = {
        "loss": result.loss,
        "cross_entropy": result.cross_entropy,
        "lr": result.lr,
        "grad_norm": result.grad_norm,
        "tokens": result.num_tokens,
        "tokens_per_s": result.num_tokens / (step_s + slowest.times["waited_s"]),
        "step_s": step_s,
        **slowest.times,
        "shortened": sum(part.shortened for part in parts),
        "skipped": sum(part.skipped for part in parts),
        "folded_system": sum(part.folded_system for part in parts),
    }
    if not teachers:
        return values
    positions, valid = sum(part.positions for part in parts), sum(part.valid for part in parts)
    return values | {
        "divergence": result.divergence if valid else None,
        "coverage": valid / positions if positions else None,
        "mass": sum(part.mass for part in parts) / valid if valid else None,
        "tail": sum(part.tail for part in parts) / valid if valid else None,
        "vanished": sum(part.vanished for part in parts),
        "teachers": {
            name: _teacher([part.teachers[i] for part in parts], parts, slowest.teachers[i].waited_s)
            | ({"loss": result.parts[name]} if name in result.parts else {})
            for i, name in enumerate(teachers)
        },
    }


def _teacher(own: Sequence[TeacherPart], parts: Sequence[BatchPart], waited_s: float) -> dict[str, Any]:
    total = sum((each.report for each in own), AlignmentReport())
    return {
        "share": sum(each.share for each in own) / sum(part.lessons for part in parts),
        "left_out": sum(each.left_out for each in own),
        "absent": sum(each.absent for each in own),
        "mass": _number(total.mean_mass),
        "own_bpb": _number(total.teacher_bpb),
        "aligned_bpb": _number(total.aligned_bpb),
        "waited_s": waited_s,
        "tokens_per_s": sum(each.fleet.get("tokens_per_s", 0.0) for each in own),
        "fleet": {name: value for name, value in own[0].fleet.items() if name != "tokens_per_s"},
    }


def _number(value: float) -> float | None:
    """JSON has no NaN; a figure over no bytes is absent."""
    return value if math.isfinite(value) else None
