"""The parts of the loss that belong to teachers whose tokens are not translated: their shares, and what they said.

Those matched by `sorted` become spreads, those matched by `spans` become spans; losses.py says what is done with them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from alignment.unaligned import SortedProbs, SpanLikelihoods
from trainer.config import RunConfig
from trainer.learning.labels import Labels, Spans, Spread
from trainer.targets.fuser import Lesson, part_shares
from trainer.targets.pipeline import supervised_from


@dataclass(frozen=True)
class Part:
    """A teacher with its own part: which of the run's teachers, and its share of what all teachers weigh."""

    index: int
    name: str
    match: Literal["spans", "sorted"]
    share: float


def parts_of(config: RunConfig, progress: float) -> tuple[Part, ...]:
    """The parts of the run's teachers at a progress of 0 to 1: those by `sorted` first, then those by `spans`."""
    parts = [
        Part(i, teacher.name, teacher.match, float(share))
        for i, (teacher, share) in enumerate(zip(config.teachers, part_shares(config, progress), strict=True))
        if teacher.match == "spans" or teacher.match == "sorted"
    ]
    return tuple(sorted(parts, key=lambda part: part.match))


def target_share(config: RunConfig, progress: float) -> float:
    """What the fused teachers weigh of all."""
    teachers = zip(config.teachers, part_shares(config, progress), strict=True)
    fused = [float(share) for teacher, share in teachers if teacher.is_fused]
    return 1.0 if len(fused) == len(config.teachers) else sum(fused)


def with_parts(labels: Labels, lessons: Sequence[Lesson], parts: Sequence[Part], first_position: int) -> Labels:
    """The labels of all lessons' supervised positions with what the parts' teachers said there."""
    return replace(
        labels,
        spreads=tuple(spread_from(lessons, part, first_position) for part in parts if part.match == "sorted"),
        spans=tuple(spans_from(lessons, part, first_position) for part in parts if part.match == "spans"),
    )


def spread_from(lessons: Sequence[Lesson], part: Part, first_position: int) -> Spread:
    """One teacher's sorted probabilities at the supervised positions of all lessons, one after another."""
    found = [lesson.unaligned[part.index] for lesson in lessons]
    wide = max([1, *(own.probs.shape[1] for own in found if isinstance(own, SortedProbs))])
    columns = [(np.zeros((0, wide), dtype=np.float32), np.zeros(0, dtype=np.float32))]
    for lesson, own in zip(lessons, found, strict=True):
        probs_TK = np.zeros((len(lesson.tokens), wide), dtype=np.float32)
        tail_T = np.zeros(len(lesson.tokens), dtype=np.float32)
        if isinstance(own, SortedProbs):
            probs_TK[own.positions, : own.probs.shape[1]], tail_T[own.positions] = own.probs, own.tail
        wanted = supervised_from(lesson, first_position)
        columns.append((probs_TK[first_position:][wanted], tail_T[first_position:][wanted]))
    probs, tail = (torch.from_numpy(np.concatenate(column)) for column in zip(*columns, strict=True))
    return Spread(probs, tail, part.share)


def spans_from(lessons: Sequence[Lesson], part: Part, first_position: int) -> Spans:
    """One teacher's spans over the supervised positions of all lessons, but for those that are not supervised whole."""
    columns = [(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32))]
    for lesson in lessons:
        at = first_position + np.flatnonzero(supervised_from(lesson, first_position))
        back_T, logprobs_T = np.full(len(at), -1), np.zeros(len(at), dtype=np.float32)
        own = lesson.unaligned[part.index]
        if isinstance(own, SpanLikelihoods) and len(own):
            begin, end = own.student.T
            span_T = np.searchsorted(begin, at, side="right") - 1
            inside_T = (span_T >= 0) & (at < end[span_T])
            whole = np.bincount(span_T[inside_T], minlength=len(own)) == end - begin
            inside_T &= whole[span_T]
            back_T[inside_T] = (at - begin[span_T])[inside_T]
            logprobs_T[inside_T] = own.logprobs[span_T][inside_T]
        columns.append((back_T, logprobs_T))
    back_T, logprobs_T = (np.concatenate(column) for column in zip(*columns, strict=True))
    return Spans.of(back_T, logprobs_T, part.share)
