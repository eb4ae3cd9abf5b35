"""Is this fusion worth running? Every teacher and every fusion on the held-out text, before any training.

All figures are bits per byte of the same bytes: in each sample, those from the first boundary on that the
student and all teachers share and from which all of them have spoken.
"""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alignment import Target, Tokens
from alignment.report import bits_per_byte
from trainer.config import RunConfig
from trainer.data import Sample, load_corpus
from trainer.errors import DataError
from trainer.evaluate import text_nats
from trainer.fusion import METHODS, fuse
from trainer.pipeline import Answer, connected, together
from trainer.student import Student, load_student


@dataclass(frozen=True)
class TeacherPreview:
    """One teacher on the held-out text."""

    name: str
    own_bpb: float
    aligned_bpb: float
    mean_mass: float


@dataclass(frozen=True)
class Preview:
    """Bits per byte of student, teachers and fusions over `num_bytes` bytes and `positions` student tokens."""

    student_bpb: float
    teachers: tuple[TeacherPreview, ...]
    fused_bpb: dict[str, float]
    num_bytes: int
    positions: int


@dataclass(frozen=True, eq=False)
class _Common:
    """The part of one sample that everybody speaks of: from byte `begin`, student position `first` on."""

    tokens: Tokens
    answers: list[Answer]
    begin: int
    first: int

    @property
    def num_bytes(self) -> int:
        return self.tokens.num_bytes - self.begin

    @property
    def labels(self) -> NDArray[np.int64]:
        return self.tokens.ids


def preview(config: RunConfig) -> Preview:
    """Ask every teacher about the held-out text. Raises DataError if nothing is held out."""
    student = load_student(config.student)
    corpus = load_corpus(config.data, config.eval, student.vocabulary, config.train.seed)
    if not config.teachers:
        raise DataError("there is no teacher to preview: add [[teachers]] to the run file")
    if not corpus.held_out:
        raise DataError("nothing is held out: set eval.held_out_documents")
    samples = list(asyncio.run(_ask(config, student, corpus.held_out)))
    return measure(config, student, samples)


async def _ask(config: RunConfig, student: Student, held_out: Sequence[Sample]) -> list[_Common]:
    async with connected(config, student.vocabulary) as teachers:
        answers = await together(teachers.answers(sample) for sample in held_out)
    encoded = [student.vocabulary.encode(sample.text, close=sample.closes) for sample in held_out]
    return [c for tokens, each in zip(encoded, answers, strict=True) for c in _common(tokens, each, student)]


def _common(tokens: Tokens, answers: list[Answer], student: Student) -> Iterator[_Common]:
    """The sample's common part, if it has one."""
    spoken = np.logical_and.reduce(
        [a.target.valid for a in answers] + [np.arange(len(tokens)) >= student.first_position]
    )
    starts = np.concatenate([[0], tokens.ends[:-1]])
    for first in np.flatnonzero(spoken):
        begin = int(starts[first])
        if spoken[first:].all() and all(_own_nats(a, begin) is not None for a in answers):
            yield _Common(tokens, answers, begin, int(first))
            return


def _own_nats(answer: Answer, begin: int) -> float | None:
    """The teacher's own log-likelihood of the text from a byte on; None if none of its rows begins there."""
    if answer.rows is None:
        return None
    starts = np.concatenate([[0], answer.tokens.ends[:-1]])
    at = np.flatnonzero((starts == begin) & (np.arange(len(starts)) >= answer.first_row))
    return float(answer.rows.actual[at[0] - answer.first_row :].sum(dtype=np.float64)) if len(at) else None


def measure(config: RunConfig, student: Student, samples: Sequence[_Common]) -> Preview:
    """Bits per byte of everything over the samples' common parts. Raises DataError if there are none."""
    num_bytes = sum(sample.num_bytes for sample in samples)
    if not num_bytes:
        raise DataError("the held-out text has no part that the student and every teacher speak of: give longer text")
    chunk, skip = config.loss.chunk_tokens, student.first_position
    nats = [float(text_nats(student, s.tokens, chunk)[s.first - skip :].double().sum()) for s in samples]
    teachers = []
    for i, teacher in enumerate(config.teachers):
        own = sum(_own_nats(s.answers[i], s.begin) or 0.0 for s in samples)
        targets = [s.answers[i].target for s in samples]
        mass = np.concatenate([t.mass[s.first :] for t, s in zip(targets, samples, strict=True)])
        teachers.append(
            TeacherPreview(
                teacher.name,
                bits_per_byte(own, num_bytes),
                _target_bpb(targets, samples, num_bytes),
                float(mass.mean()),
            )
        )
    weights = [teacher.weight for teacher in config.teachers]
    fused = {
        method: _target_bpb(
            [fuse([a.target for a in s.answers], s.labels, weights, method).target for s in samples], samples, num_bytes
        )
        for method in METHODS
    }
    positions = sum(len(s.tokens) - s.first for s in samples)
    return Preview(bits_per_byte(-sum(nats), num_bytes), tuple(teachers), fused, num_bytes, positions)


def _target_bpb(targets: Iterable[Target], samples: Sequence[_Common], num_bytes: int) -> float:
    total = 0.0
    for target, sample in zip(targets, samples, strict=True):
        with np.errstate(divide="ignore"):
            total += float(np.log(target.prob_of(sample.labels)[sample.first :]).sum())
    return bits_per_byte(total, num_bytes)
