"""Compare every teacher and every fusion on held-out text before any training.

All values are bits per byte over the same bytes. In a text, these are the bytes after the first token boundary that the
student and all teachers share and after which all teachers have scores. In a chat, they are the bytes of the supervised
positions at which all teachers have a target. A fusion method that computes weights from the loss of the text (min_ce,
avg_ce) has seen the text: the smaller its scope, the lower its bits per byte. Its value describes the training target,
not the prediction of unseen text.
"""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from alignment import Target
from alignment.report import bits_per_byte
from trainer.config import RunConfig
from trainer.errors import DataError
from trainer.evaluation.bits_per_byte import token_nats
from trainer.fusion import FUSION_METHODS
from trainer.fusion.base import SCOPES, fusion_method
from trainer.fusion.run_fuser import Fuser
from trainer.query.config import TeacherConfig
from trainer.query.connect import check_chat_support, connect_teachers
from trainer.query.prefetch import Prefetcher
from trainer.query.score import SampleScorer
from trainer.query.stream import prefetch_limits
from trainer.records import Sample, ScoredSample, TeacherScores
from trainer.sources.corpus import load_corpus
from trainer.student.loading import load_student, student_tokenizer
from trainer.student.model import Student
from trainer.tokenization import SampleTokenizer


@dataclass(frozen=True)
class TeacherPreview:
    """One teacher on the held-out text.

    own_bpb      bits per byte of the teacher's own tokens; None if there are chats or prompts, because the tokens of
                 the teacher do not end where the supervised tokens of the student do
    aligned_bpb  bits per byte of the aligned targets; infinite if a target does not list a token of the text (em,
                 min_ed)
    mean_mass    mean listed probability per position
    """

    name: str
    own_bpb: float | None
    aligned_bpb: float
    mean_mass: float


@dataclass(frozen=True)
class Preview:
    """Bits per byte of student, teachers and fusions over `num_bytes` bytes and `positions` student tokens.

    fused_bpb is by fusion method. It is empty with one fused teacher, because no method changes a single target.
    """

    student_bpb: float
    teachers: tuple[TeacherPreview, ...]
    fused_bpb: dict[str, float]
    num_bytes: int
    positions: int


@dataclass(frozen=True, eq=False)
class _CommonPart:
    """The part of a sample that the student and all teachers predict.

    positions  [T] bool, positions of the student
    own_nats   log-likelihood of the part under each teacher's own tokens; None for a chat or a text with a prompt
    """

    scored: ScoredSample
    positions: NDArray[np.bool_]
    own_nats: tuple[float, ...] | None

    @property
    def num_bytes(self) -> int:
        return int(self.scored.tokenized.num_bytes_T[self.positions].sum())

    def nats(self, target: Target) -> float:
        """Return the log-likelihood of the text under a target; −inf if a token is not listed."""
        with np.errstate(divide="ignore"):
            return float(np.log(target.prob_of(self.scored.tokenized.tokens.ids)[self.positions]).sum())


@dataclass
class _Sums:
    """Log-likelihoods in nats, summed over the common parts."""

    student: float = 0.0
    own: dict[str, float] = field(default_factory=dict)
    aligned: dict[str, float] = field(default_factory=dict)
    mass: dict[str, float] = field(default_factory=dict)
    fused: dict[str, float] = field(default_factory=dict)
    num_bytes: int = 0
    positions: int = 0
    has_own: bool = True


def preview(config: RunConfig) -> Preview:
    """Compare the student, every fused teacher and every fusion on held-out text, within the run's memory limits.

    Raises DataError if there is no held-out text, or if no teacher is fused.
    """
    config = config.model_copy(update={"teachers": _fused_teachers(config.teachers)})
    if not config.teachers:
        raise DataError("no teacher to preview: add [[teachers]] with a signal that is fused to the run file")
    student = load_student(config.student)
    corpus = load_corpus(config.data, config.eval, student.vocabulary, config.train.seed)
    if not corpus.held_out:
        raise DataError("there is no held-out text to measure on; set eval.held_out_documents")
    check_chat_support(config.teachers, corpus)
    tokenizer = student_tokenizer(student.folder, student.vocabulary, config.student, config.data, corpus.has_chats)
    measurement = Measurement(config, student)
    asyncio.run(_score(config, tokenizer, corpus.held_out, measurement))
    return measurement.result()


def _fused_teachers(teachers: Sequence[TeacherConfig]) -> list[TeacherConfig]:
    """Return the teachers that are fused. If all of them start with weight 0, their final weights are used."""
    fused = [teacher for teacher in teachers if teacher.is_fused]
    if any(teacher.weight for teacher in fused):
        return fused
    return [teacher.model_copy(update={"weight": teacher.end_weight or 1.0}) for teacher in fused]


async def _score(
    config: RunConfig, tokenizer: SampleTokenizer, held_out: Sequence[Sample], measurement: "Measurement"
) -> None:
    size = config.train.batch_samples
    batches = iter([held_out[begin : begin + size] for begin in range(0, len(held_out), size)])
    async with connect_teachers(config.teachers, tokenizer, config.data) as connection:
        scorer = SampleScorer(connection, tokenizer, config.data)
        prefetcher = Prefetcher(prefetch_limits(config), scorer, batches)
        async with aclosing(prefetcher.batches()) as scored_batches:
            async for scored in scored_batches:
                samples = [one.sample for one, _ in scored if one.sample is not None]
                await asyncio.to_thread(measurement.add, samples)
                prefetcher.taken([reservation for _, reservation in scored])


class Measurement:
    """Measures the common parts of held-out samples, in batches of the run's size."""

    def __init__(self, config: RunConfig, student: Student) -> None:
        self._config = config
        self._student = student
        self._sums = _Sums()
        vocab_size = len(student.vocabulary)
        self._fusers = {name: Fuser(run, vocab_size, cut=False) for name, run in _fusions(config)}

    def add(self, batch: Sequence[ScoredSample]) -> None:
        """Measure one batch."""
        parts = [part for scored in batch for part in _common_part(scored, self._student.first_position)]
        for part in parts:
            self._add_models(part)
        for name, fuser in self._fusers.items():
            examples = fuser.fuse([part.scored for part in parts])
            for part, example in zip(parts, examples, strict=True):
                if example.target is not None:
                    self._sums.fused[name] = self._sums.fused.get(name, 0.0) + part.nats(example.target)

    def _add_models(self, part: _CommonPart) -> None:
        sums = self._sums
        sums.num_bytes += part.num_bytes
        sums.positions += int(part.positions.sum())
        sums.has_own &= part.own_nats is not None
        sums.student += _student_nats(self._student, part, self._config.loss.chunk_tokens)
        for i, teacher in enumerate(self._config.teachers):
            target, name = part.scored.scores[i].target, teacher.name
            sums.aligned[name] = sums.aligned.get(name, 0.0) + part.nats(target)
            sums.mass[name] = sums.mass.get(name, 0.0) + float(target.mass[part.positions].sum())
            if part.own_nats is not None:
                sums.own[name] = sums.own.get(name, 0.0) + part.own_nats[i]

    def result(self) -> Preview:
        """Return the result. Raises DataError if the samples have no common part."""
        sums, num_bytes = self._sums, self._sums.num_bytes
        if not num_bytes:
            raise DataError(
                "the held-out text has no part that the student and every teacher predict: hold out longer documents"
            )
        teachers = tuple(
            TeacherPreview(
                name=teacher.name,
                own_bpb=bits_per_byte(sums.own[teacher.name], num_bytes) if sums.has_own else None,
                aligned_bpb=bits_per_byte(sums.aligned[teacher.name], num_bytes),
                mean_mass=sums.mass[teacher.name] / sums.positions,
            )
            for teacher in self._config.teachers
        )
        fused = {name: bits_per_byte(nats, num_bytes) for name, nats in sums.fused.items()}
        return Preview(bits_per_byte(-sums.student, num_bytes), teachers, fused, num_bytes, sums.positions)


def _common_part(scored: ScoredSample, first_position: int) -> Iterator[_CommonPart]:
    """Yield the sample's common part, if it has one."""
    valid = np.logical_and.reduce([scores.target.valid for scores in scored.scores])
    valid &= np.arange(len(valid)) >= first_position
    if scored.sample.is_chat or scored.sample.prompt_bytes:
        valid &= scored.tokenized.supervised_T
        if valid.any():
            yield _CommonPart(scored, valid, None)
        return
    tokens = scored.tokenized.tokens
    for first in np.flatnonzero(valid):
        begin = int(tokens.starts[first])
        nats = [_own_nats(scores, begin) for scores in scored.scores]
        if valid[first:].all() and None not in nats:
            yield _CommonPart(scored, np.arange(len(tokens)) >= first, tuple(n or 0.0 for n in nats))
            return


def _own_nats(scores: TeacherScores, begin: int) -> float | None:
    """Return the teacher's log-likelihood of the text after a byte offset; None if no scored token starts there."""
    starts = scores.tokenized.tokens.starts
    matches = np.flatnonzero((starts == begin) & (np.arange(len(starts)) >= scores.first_row))
    if not len(matches) or not len(scores.actual_R):
        return None
    return float(scores.actual_R[matches[0] - scores.first_row :].sum(dtype=np.float64))


def _student_nats(student: Student, part: _CommonPart, chunk_tokens: int) -> float:
    nats_T = token_nats(student, [part.scored.tokenized.tokens], chunk_tokens)[0].double()
    return float(nats_T[torch.from_numpy(part.positions[student.first_position :])].sum())


def _fusions(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """Yield every fusion method, once per scope if it uses scopes, with the other [fusion] settings of the run."""
    if len(config.teachers) == 1:
        return
    for method in FUSION_METHODS:
        if method == "router" and not config.data.names_teachers:
            continue
        for scope in SCOPES if fusion_method(method).uses_scope else ("sample",):
            fusion = config.fusion.model_copy(update={"method": method, "scope": scope})
            name = f"{method} by {scope}" if fusion_method(method).uses_scope else method
            yield name, config.model_copy(update={"fusion": fusion})
