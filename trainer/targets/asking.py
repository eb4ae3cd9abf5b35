"""From a sample to every teacher's target for it: read, ask, align. Here teachers and alignment meet.

`connected` opens a run's teachers: the card, the tokenizer and the translation of each. `Teachers.ask` is the way of
one sample, which all models see whole: one that a model cannot take is refused, or shortened for all of them alike.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from alignment import AlignmentError, Target, Translation, Vocabulary, align, translate
from alignment.fusellm import TokenMap, fusellm_target, token_map
from alignment.report import AlignmentReport, report
from alignment.unaligned import SortedProbs, SpanLikelihoods, sorted_probs, span_likelihoods
from teachers.asking.address import TeacherAddress
from teachers.asking.pool import TeacherPool
from teachers.errors import Rejected, TeacherError, TeacherLost
from teachers.keys import key_from_environment, key_from_file
from teachers.protocol import Card
from teachers.rows import Rows
from trainer.config import RunConfig, TeacherConfig
from trainer.data.reading import Reader, Reading, chat_template, shorter
from trainer.data.samples import Sample
from trainer.data.template import ChatError
from trainer.places import find_tokenizer, tables_dir
from trainer.targets.align_chat import align_chat
from trainer.targets.threads import in_thread

T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """When an answer was asked for and when it came, by time.monotonic(); CPU seconds of its alignment."""

    asked_at: float
    came_at: float
    align_s: float = 0.0


@dataclass(frozen=True, eq=False)
class Answer:
    """One teacher's answer for one sample, before and after alignment.

    first_row is the teacher token that the first row speaks of: 0 with BOS, 1 without. There are no rows for a
    text that the teacher writes in a single token without BOS; its target is then valid nowhere. That is so too where
    the teacher's tokens are not translated: then `unaligned` holds what it says.
    """

    rows: Rows | None
    first_row: int
    reading: Reading
    target: Target
    report: AlignmentReport
    nats_per_token: float = math.inf  # that the teacher pays for its own tokens; inf where it has said nothing
    absent: bool = False  # the teacher was lost, and the run goes on without it
    unaligned: SpanLikelihoods | SortedProbs | None = None
    timing: Timing | None = None  # None where nothing was asked, and of an answer that is kept

    @property
    def nbytes(self) -> int:
        """What it takes in memory, without its rows."""
        return self.target.nbytes + self.reading.nbytes + (self.unaligned.nbytes if self.unaligned else 0)


@dataclass(frozen=True, eq=False)
class Read:
    """One sample that all models can take whole, as the student and every teacher reads it; `shortened` if it had to
    be. read_s: CPU seconds of reading it."""

    sample: Sample
    reading: Reading
    own: tuple[Reading, ...]
    shortened: bool
    read_s: float = 0.0


@dataclass(frozen=True, eq=False)
class Asked:
    """One sample, as it was read by the student and as every teacher answered it; `shortened` if it had to be."""

    sample: Sample
    reading: Reading
    answers: tuple[Answer, ...]
    shortened: bool = False
    read_s: float = 0.0

    @property
    def nbytes(self) -> int:
        """What it takes in memory, without rows."""
        return self.reading.nbytes + sum(answer.nbytes for answer in self.answers)

    def without_rows(self) -> "Asked":
        return replace(self, answers=tuple(replace(answer, rows=None) for answer in self.answers))

    def without_cost(self) -> "Asked":
        """As it is given a second time: nothing was read, asked or aligned for it."""
        return replace(self, answers=tuple(replace(answer, timing=None) for answer in self.answers), read_s=0.0)


@dataclass(frozen=True, eq=False)
class Teacher:
    """A connected teacher, seen from one student. Its tokens are translated where it is fused; `mapping` is how the
    paper maps them, where it is matched so."""

    config: TeacherConfig
    card: Card
    reader: Reader
    translation: Translation | None
    mapping: TokenMap | None = None

    def sequence(self, reading: Reading) -> list[int]:
        """The ids to score."""
        return [*self.card.prefix, *reading.tokens.ids.tolist()]

    def first_wanted(self, reading: Reading) -> int:
        """The first position to score: of a chat, that of its first supervised token. At least 1."""
        is_chat = reading.rendered is not None and self.translation is not None
        first = int(reading.supervised_T.argmax()) if is_chat else 0
        return max(len(self.card.prefix) + first, 1)


class Teachers:
    """All teachers of a run, for one student. Made by `connected`, inside one event loop."""

    def __init__(self, pool: TeacherPool, teachers: Sequence[Teacher], student: Reader, config: RunConfig):
        self._pool = pool
        self._student = student
        self._data = config.data
        self.teachers = tuple(teachers)

    def stats(self) -> dict[str, dict[str, float]]:
        """By a teacher's name, how its replicas did so far, as teachers.asking.fleet.FleetStats has it."""
        return {name: asdict(stats) for name, stats in self._pool.stats().items()}

    async def ask(self, sample: Sample) -> Asked | None:
        """Read the sample and ask all teachers about it. None for a chat that is to be skipped."""
        read = await self.read(sample)
        return None if read is None else await self.answers(read)

    async def read(self, sample: Sample) -> Read | None:
        """The sample as everybody reads it, shortened until all can take it. None for a chat that is to be skipped."""
        try:
            read, read_s = await in_thread(self._fitted, sample)
        except ChatError:
            if self._data.broken_chats == "skip":
                return None
            raise
        return replace(read, read_s=read_s)

    async def answers(self, read: Read) -> Asked:
        """Ask all teachers at once; the first error ends the others."""
        asked = zip(self.teachers, read.own, strict=True)
        answers = await together(self._answer(teacher, read.sample, (own, read.reading)) for teacher, own in asked)
        if answers and all(answer.absent for answer in answers):
            raise TeacherLost(f"every teacher is lost, there is nobody left to learn from (sample {read.sample.name})")
        return Asked(read.sample, read.reading, tuple(answers), read.shortened, read.read_s)

    def _fitted(self, given: Sample) -> Read:
        sample = given
        while True:
            reading = self._student.read(sample)
            readings = [teacher.reader.read(sample) for teacher in self.teachers]
            limits = [(t.card.max_tokens - len(t.card.prefix), f"teacher {t.config.name}") for t in self.teachers]
            limits.append((self._data.window_tokens + sample.closes, "the student's window"))
            read = zip([*readings, reading], limits, strict=True)
            too_long = [(own, limit, who) for own, (limit, who) in read if len(own) > limit]
            if not too_long:
                return Read(sample, reading, tuple(readings), sample is not given)
            sample = shorter(sample, *too_long[0], self._data)

    async def _answer(self, teacher: Teacher, sample: Sample, readings: tuple[Reading, Reading]) -> Answer:
        own, student = readings
        sequence = teacher.sequence(own)
        nothing = Target.nothing(len(student))
        silent = Answer(None, 0, own, nothing, AlignmentReport(positions=len(nothing)))
        if len(sequence) < 2:  # one token with nothing in front: there is no position to predict
            return silent
        start, asked_at = teacher.first_wanted(own), time.monotonic()
        try:
            rows = await self._pool.score(teacher.config.name, sequence, start, teacher.config.top_k, sample.name)
        except TeacherLost:  # said loudly where it was lost
            return replace(silent, absent=True)
        except TeacherError as error:
            error.args = (f"{error} (sample {sample.name})",)
            raise
        came_at = time.monotonic()
        try:
            answer, align_s = await in_thread(_aligned, rows, teacher, own, student)
        except AlignmentError as error:
            raise AlignmentError(f"teacher {teacher.config.name}, sample {sample.name}: {error}") from error
        return replace(answer, timing=Timing(asked_at, came_at, align_s))


def _aligned(rows: Rows, teacher: Teacher, own: Reading, student: Reading) -> Answer:
    first_row = rows.start - len(teacher.card.prefix)
    if teacher.translation is None:
        return _unaligned(rows, teacher, own, student)
    if own.rendered is not None and student.rendered is not None:
        whole = replace(rows, start=len(own.rendered.prefix) + own.hidden_bos + first_row)
        chat = align_chat(whole, own.rendered, student.rendered, teacher.translation)
        supervised = rows.actual[own.supervised_T[first_row:]]
        target = chat.target.after(student.hidden_bos)
        nats = -float(supervised.mean(dtype=float)) if len(supervised) else math.inf
        return Answer(rows, first_row, own, target, chat.report, nats)
    tokens = (own.tokens, student.tokens)
    if teacher.mapping is None:
        target = align(rows, first_row, *tokens, teacher.translation)
    else:
        target = fusellm_target(rows, first_row, *tokens, teacher.mapping)
    figures = report(rows, first_row, tokens, target, teacher.translation)
    return Answer(rows, first_row, own, target, figures, -float(rows.actual.mean(dtype=float)))


def _unaligned(rows: Rows, teacher: Teacher, own: Reading, student: Reading) -> Answer:
    """Its bits per byte are over the spans that it speaks of; listed mass and aligned bits per byte, as far as any."""
    first_row, tokens = 1 - len(teacher.card.prefix), (own.tokens, student.tokens)
    spans = span_likelihoods(rows, first_row, *tokens)
    said: SpanLikelihoods | SortedProbs = spans
    valid, mass = int(np.diff(spans.student).sum()), math.nan
    if teacher.config.match == "sorted":
        said = sorted_probs(rows, first_row, *tokens)
        valid, mass = len(said), float(said.probs.sum(dtype=float))
    nats, num_bytes = float(spans.logprobs.sum()), int(spans.num_bytes.sum())
    figures = AlignmentReport(len(student), valid, mass, nats, math.nan, num_bytes)
    nothing, per_token = Target.nothing(len(student)), -float(rows.actual.mean(dtype=float))
    return Answer(rows, first_row, own, nothing, figures, per_token, unaligned=said)


def address_of(teacher: TeacherConfig) -> TeacherAddress:
    """A run file's teacher as the pool wants it. Raises TeacherError if its key cannot be read."""
    return TeacherAddress(
        name=teacher.name,
        urls=tuple(teacher.urls),
        urls_file=Path(teacher.urls_file) if teacher.urls_file else None,
        key=_key_of(teacher),
        ca_file=Path(teacher.ca_file) if teacher.ca_file else None,
        tokenizer=find_tokenizer(teacher.tokenizer) if teacher.tokenizer else None,
        timeout_s=teacher.timeout_s,
        patience_s=teacher.patience_s,
        on_loss=teacher.on_loss,
        concurrency=teacher.concurrency,
    )


def _key_of(teacher: TeacherConfig) -> str | None:
    if teacher.key_file is not None:
        return key_from_file(Path(teacher.key_file))
    return key_from_environment(teacher.key_env) if teacher.key_env is not None else None


def checked_vocabulary(teacher: TeacherConfig, card: Card, files: Mapping[str, bytes]) -> Vocabulary:
    """The tokens that its model has. Raises TeacherError or TokenizerError, by its name, for what would go wrong later:
    a K that it does not answer, tokens that its model does not know, another BOS than its own."""
    if teacher.top_k > card.max_top_k:
        raise Rejected(f"teacher {teacher.name}: top_k is {teacher.top_k}, it answers at most {card.max_top_k}")
    vocabulary = Vocabulary.from_files(files, name=teacher.name).with_roles(teacher.roles).within(card.vocab_size)
    bos = vocabulary.roles.get("bos")
    if card.prefix and bos is not None and card.prefix != [bos]:
        raise TeacherError(
            f"teacher {teacher.name}: token {card.prefix[0]} is put in front of every text, its tokenizer's BOS is "
            f"{bos}: if that is wrong, name the right one in roles of this teacher"
        )
    return vocabulary


@asynccontextmanager
async def connected(
    config: RunConfig, student: Reader, report: Callable[[dict[str, str]], None] = lambda _: None
) -> AsyncIterator[Teachers]:
    """Connect to every teacher of a run, check its card, and find or build its translation.

    `report` hears of teachers that are lost and of those that are back, as teachers.asking.roster.Event has it.
    """
    addresses = [address_of(teacher) for teacher in config.teachers]
    async with TeacherPool(addresses, lambda event: report(asdict(event))) as pool:
        answers = await together(pool.connect(teacher.name) for teacher in config.teachers)
        teachers = []
        for teacher, (card, files) in zip(config.teachers, answers, strict=True):
            vocabulary = checked_vocabulary(teacher, card, files)
            template = None
            if config.data.has_chats:
                template = chat_template(files, vocabulary, teacher.roles, teacher.chat_template)
            reader = Reader(vocabulary, card.prefix, template)
            translation, mapping = await asyncio.to_thread(_matched, teacher, card, vocabulary, student.vocabulary)
            teachers.append(Teacher(teacher, card, reader, translation, mapping))
        try:
            yield Teachers(pool, teachers, student, config)
        finally:
            for mapping in (teacher.mapping for teacher in teachers if teacher.mapping):
                mapping.save()


def _matched(
    teacher: TeacherConfig, card: Card, own: Vocabulary, student: Vocabulary
) -> tuple[Translation | None, TokenMap | None]:
    """What its alignment needs, found or made."""
    if not teacher.is_fused:
        return None, None
    translation = translate(own, student, card.vocab_size, cache=tables_dir())
    return translation, None if teacher.match == "chain" else token_map(own, student, teacher.match, tables_dir())


async def together(questions: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order; the first error ends the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(question) for question in questions]
    except BaseExceptionGroup as group_error:
        raise group_error.exceptions[0] from None
    return [task.result() for task in tasks]
