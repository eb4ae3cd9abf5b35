"""Is this fusion worth running? Every teacher and every fusion on the held-out text, before any training.

All figures are bits per byte of the same bytes: in each sample, those from the first boundary on that the
student and all teachers share and from which all of them have spoken; of a chat, its supervised positions of which
all of them speak. A fusion that chooses by the loss of the text (min_ce, avg_ce) has seen it: the smaller the scope,
the more its figure flatters it. It is what the student would be taught, not what could be predicted.
"""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from alignment import Target
from alignment.report import bits_per_byte
from trainer.config import RunConfig
from trainer.data.samples import Sample, load_corpus
from trainer.errors import DataError
from trainer.learning.student import Student, load_student, reader_of
from trainer.results.evaluate import token_nats
from trainer.targets.asking import Answer, Asked, connected, together
from trainer.targets.fuser import Fuser
from trainer.targets.fusion import METHODS, SCOPES

BY_SCOPE = ("min_ce", "avg_ce", "confidence")


@dataclass(frozen=True)
class TeacherPreview:
    """One teacher on the held-out text; own_bpb is absent where chats are: its own tokens have other ends there."""

    name: str
    own_bpb: float | None
    aligned_bpb: float
    mean_mass: float


@dataclass(frozen=True)
class Preview:
    """Bits per byte of student, teachers and fusions over `num_bytes` bytes and `positions` student tokens.

    fused_bpb is empty of one teacher, which every fusion leaves as it is.
    """

    student_bpb: float
    teachers: tuple[TeacherPreview, ...]
    fused_bpb: dict[str, float]
    num_bytes: int
    positions: int


@dataclass(frozen=True, eq=False)
class _Common:
    """The part of one sample that everybody speaks of: `wanted` positions of the student, and their bytes.

    own_nats  each teacher's own log-likelihood there; None of a chat, whose spans its tokens cut otherwise
    """

    asked: Asked
    wanted: NDArray[np.bool_]
    own_nats: tuple[float, ...] | None

    @property
    def num_bytes(self) -> int:
        return int(self.asked.reading.num_bytes_T[self.wanted].sum())

    @property
    def labels(self) -> NDArray[np.int64]:
        return self.asked.reading.tokens.ids


def preview(config: RunConfig) -> Preview:
    """Ask every teacher about the held-out text. Raises DataError if nothing is held out."""
    config = config.model_copy(update={"teachers": [t for t in config.teachers if t.is_fused]})
    student = load_student(config.student)
    corpus = load_corpus(config.data, config.eval, student.vocabulary, config.train.seed)
    if not config.teachers:
        raise DataError("there is no teacher to preview: add [[teachers]] that are fused to the run file")
    if not corpus.held_out:
        raise DataError("nothing is held out: set eval.held_out_documents")
    samples = list(asyncio.run(_ask(config, student, corpus.held_out)))
    return measure(config, student, samples)


async def _ask(config: RunConfig, student: Student, held_out: Sequence[Sample]) -> list[_Common]:
    async with connected(config, reader_of(student.folder, student.vocabulary, config)) as teachers:
        answers = await together(teachers.ask(sample) for sample in held_out)
    return [c for asked in answers if asked is not None for c in _common(asked, student)]


def _common(asked: Asked, student: Student) -> Iterator[_Common]:
    """The sample's common part, if it has one."""
    spoken = np.logical_and.reduce([a.target.valid for a in asked.answers])
    spoken &= np.arange(len(spoken)) >= student.first_position
    if asked.sample.is_chat:
        if spoken.any():
            yield _Common(asked, spoken, None)
        return
    tokens = asked.reading.tokens
    for first in np.flatnonzero(spoken):
        begin = int(tokens.starts[first])
        nats = [_own_nats(a, begin) for a in asked.answers]
        if spoken[first:].all() and None not in nats:
            yield _Common(asked, np.arange(len(tokens)) >= first, tuple(n or 0.0 for n in nats))
            return


def _own_nats(answer: Answer, begin: int) -> float | None:
    """The teacher's own log-likelihood of the text from a byte on; None if none of its rows begins there."""
    if answer.rows is None:
        return None
    starts = answer.reading.tokens.starts
    at = np.flatnonzero((starts == begin) & (np.arange(len(starts)) >= answer.first_row))
    return float(answer.rows.actual[at[0] - answer.first_row :].sum(dtype=np.float64)) if len(at) else None


def measure(config: RunConfig, student: Student, samples: Sequence[_Common]) -> Preview:
    """Bits per byte of everything over the samples' common parts. Raises DataError if there are none."""
    num_bytes = sum(sample.num_bytes for sample in samples)
    if not num_bytes:
        raise DataError("the held-out text has no part that the student and every teacher speak of: give longer text")
    nats = [_student_nats(student, sample, config.loss.chunk_tokens) for sample in samples]
    teachers = []
    for i, teacher in enumerate(config.teachers):
        targets = [s.asked.answers[i].target for s in samples]
        mass = np.concatenate([t.mass[s.wanted] for t, s in zip(targets, samples, strict=True)])
        teachers.append(
            TeacherPreview(
                teacher.name,
                _own_bpb(samples, i, num_bytes),
                _target_bpb(targets, samples, num_bytes),
                float(mass.mean()),
            )
        )
    fused = {name: _target_bpb(_fused(run, student, samples), samples, num_bytes) for name, run in _fusions(config)}
    positions = sum(int(s.wanted.sum()) for s in samples)
    return Preview(bits_per_byte(-sum(nats), num_bytes), tuple(teachers), fused, num_bytes, positions)


def _own_bpb(samples: Sequence[_Common], teacher: int, num_bytes: int) -> float | None:
    nats = [sample.own_nats[teacher] for sample in samples if sample.own_nats is not None]
    return bits_per_byte(sum(nats), num_bytes) if len(nats) == len(samples) else None


def _student_nats(student: Student, sample: _Common, chunk_tokens: int) -> float:
    paid = token_nats(student, [sample.asked.reading.tokens], chunk_tokens)[0].double()
    return float(paid[torch.from_numpy(sample.wanted[student.first_position :])].sum())


def _fusions(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """Every method, at every scope it knows, with the run's weights, temperature and margin; nothing of one teacher."""
    if len(config.teachers) == 1:
        return
    methods = [m for m in METHODS if m not in BY_SCOPE] + ["adaptive"]
    methods += ["router"] if config.data.names_teachers else []
    for method, scope in [(m, "sample") for m in methods] + [(m, s) for m in BY_SCOPE for s in SCOPES]:
        fusion = config.fusion.model_copy(update={"method": method, "scope": scope})
        name = f"{method} by {scope}" if method in BY_SCOPE else method
        yield name, config.model_copy(update={"fusion": fusion})


def _fused(config: RunConfig, student: Student, samples: Sequence[_Common]) -> list[Target]:
    """The fused targets, batch by batch as a run has them, uncut."""
    fuser = Fuser(config, len(student.vocabulary), cut=False)
    size, targets = config.train.batch_samples, []
    for begin in range(0, len(samples), size):
        lessons = fuser.fuse([s.asked for s in samples[begin : begin + size]])
        targets += [lesson.target for lesson in lessons if lesson.target is not None]
    return targets


def _target_bpb(targets: Iterable[Target], samples: Sequence[_Common], num_bytes: int) -> float:
    total = 0.0
    for target, sample in zip(targets, samples, strict=True):
        with np.errstate(divide="ignore"):
            total += float(np.log(target.prob_of(sample.labels)[sample.wanted]).sum())
    return bits_per_byte(total, num_bytes)
