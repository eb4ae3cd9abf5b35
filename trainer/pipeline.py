"""From samples to targets: ask every teacher, align, fuse. The one room that knows teachers and alignment.

`Teachers` holds the connection, each teacher's vocabulary and its translation; `score_sample` is the path of one
sample. `TargetStream` runs that path on a thread of its own, ahead of the step: batches come out in the order
they were asked for, whatever the order of the answers, and a sample that comes again is not asked again while its
target fits the cache.
"""

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from alignment import AlignmentError, Target, Tokens, Translation, Vocabulary, align, translate
from alignment.report import AlignmentReport, report
from teachers.errors import Rejected, TeacherError
from teachers.keys import key_from_environment, key_from_file
from teachers.pool import TeacherAddress, TeacherPool
from teachers.protocol import Card, Rows
from trainer.config import FusionConfig, RunConfig, TeacherConfig, tables_dir
from trainer.data import Sample
from trainer.fusion import fuse

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Answer:
    """One teacher's answer for one sample, before and after alignment.

    first_row is the teacher token that the first row speaks of: 0 with BOS, 1 without. There are no rows for a
    text that the teacher writes in a single token without BOS; its target is then valid nowhere.
    """

    rows: Rows | None
    first_row: int
    tokens: Tokens
    target: Target
    report: AlignmentReport


@dataclass(frozen=True, eq=False)
class Lesson:
    """What the student learns from one sample; `target` is None in plain training."""

    sample: Sample
    tokens: Tokens
    target: Target | None = None
    shares: tuple[float, ...] = ()
    reports: tuple[AlignmentReport, ...] = ()


@dataclass(frozen=True, eq=False)
class Teacher:
    """A connected teacher, seen from one student."""

    config: TeacherConfig
    card: Card
    vocabulary: Vocabulary
    translation: Translation

    @property
    def prefix(self) -> list[int]:
        return self.card.prefix


class Teachers:
    """All teachers of a run, for one student's vocabulary. Made by `connected`, inside one event loop."""

    def __init__(self, pool: TeacherPool, teachers: Sequence[Teacher], student: Vocabulary, fusion: FusionConfig):
        self._pool = pool
        self._student = student
        self._fusion = fusion
        self.teachers = tuple(teachers)

    @property
    def weights(self) -> list[float]:
        return [teacher.config.weight for teacher in self.teachers]

    async def answers(self, sample: Sample) -> list[Answer]:
        """Ask all teachers at once about one sample; the first error ends the others."""
        student = self._student.encode(sample.text, close=sample.closes)
        return await together(self._answer(teacher, sample, student) for teacher in self.teachers)

    async def _answer(self, teacher: Teacher, sample: Sample, student: Tokens) -> Answer:
        tokens = teacher.vocabulary.encode(sample.text, close=sample.closes)
        sequence = teacher.prefix + tokens.ids.tolist()
        if len(sequence) > teacher.card.max_tokens:
            raise Rejected(
                f"teacher {teacher.config.name}: sample {sample.name} is {len(sequence)} of its tokens, it takes "
                f"{teacher.card.max_tokens}: set data.window_tokens lower"
            )
        if len(sequence) < 2:  # one token with nothing in front: there is no position to predict
            nothing = Target.nothing(len(student))
            return Answer(None, 0, tokens, nothing, AlignmentReport(positions=len(nothing)))
        try:
            rows = await self._pool.score(teacher.config.name, sequence, 1, teacher.config.top_k)
        except TeacherError as error:
            error.args = (f"{error} (sample {sample.name})",)
            raise
        first_row = 1 - len(teacher.prefix)
        try:
            return await asyncio.to_thread(_aligned, rows, first_row, (tokens, student), teacher.translation)
        except AlignmentError as error:
            raise AlignmentError(f"teacher {teacher.config.name}, sample {sample.name}: {error}") from error

    async def lesson(self, sample: Sample) -> Lesson:
        """The fused target of one sample."""
        student = self._student.encode(sample.text, close=sample.closes)
        if not self.teachers:
            return Lesson(sample, student)
        answers = await self.answers(sample)
        fused = await asyncio.to_thread(
            fuse, [a.target for a in answers], student.ids, self.weights, self._fusion.method, self._fusion.top_k
        )
        return Lesson(
            sample, student, fused.target, tuple(fused.shares_N.tolist()), tuple(answer.report for answer in answers)
        )


def _aligned(rows: Rows, first_row: int, tokens: tuple[Tokens, Tokens], translation: Translation) -> Answer:
    target = align(rows, first_row, *tokens, translation)
    return Answer(rows, first_row, tokens[0], target, report(rows, first_row, tokens, target, translation))


def address_of(teacher: TeacherConfig) -> TeacherAddress:
    """A run file's teacher as the pool wants it. Raises TeacherError if its key cannot be read."""
    return TeacherAddress(
        name=teacher.name,
        urls=tuple(teacher.urls),
        key=_key_of(teacher),
        timeout_s=teacher.timeout_s,
        patience_s=teacher.patience_s,
        concurrency=teacher.concurrency,
    )


def _key_of(teacher: TeacherConfig) -> str | None:
    if teacher.key_file is not None:
        return key_from_file(Path(teacher.key_file))
    return key_from_environment(teacher.key_env) if teacher.key_env is not None else None


def check_card(teacher: TeacherConfig, card: Card, vocabulary: Vocabulary) -> None:
    """Refuse what would go wrong later. Raises TeacherError naming the teacher."""
    if teacher.top_k > card.max_top_k:
        raise Rejected(f"teacher {teacher.name}: top_k is {teacher.top_k}, it answers at most {card.max_top_k}")
    if len(vocabulary) > card.vocab_size:
        raise TeacherError(
            f"teacher {teacher.name}: its tokenizer has {len(vocabulary)} tokens, its model only {card.vocab_size}"
        )


@asynccontextmanager
async def connected(config: RunConfig, student: Vocabulary) -> AsyncIterator[Teachers]:
    """Connect to every teacher of a run, check its card, and build its translation."""
    async with TeacherPool([address_of(teacher) for teacher in config.teachers]) as pool:
        answers = await together(pool.connect(teacher.name) for teacher in config.teachers)
        teachers = []
        for teacher, (card, files) in zip(config.teachers, answers, strict=True):
            vocabulary = Vocabulary.from_files(files, name=teacher.name)
            check_card(teacher, card, vocabulary)
            translation = await asyncio.to_thread(translate, vocabulary, student, card.vocab_size, cache=tables_dir())
            teachers.append(Teacher(teacher, card, vocabulary, translation))
        yield Teachers(pool, teachers, student, config.fusion)


class _TargetCache:
    """Lessons by sample index, in memory, until a number of bytes is reached; then new ones are not kept."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._lessons: dict[int, Lesson] = {}
        self.nbytes = 0

    def get(self, sample: Sample) -> Lesson | None:
        return self._lessons.get(sample.index)

    def put(self, lesson: Lesson) -> None:
        nbytes = lesson.tokens.ids.nbytes * 2 + (lesson.target.nbytes if lesson.target else 0)
        if lesson.sample.index not in self._lessons and self.nbytes + nbytes <= self._limit:
            self._lessons[lesson.sample.index] = lesson
            self.nbytes += nbytes


@dataclass(frozen=True)
class Batch:
    """Lessons in order, and how long the step waited for them."""

    lessons: tuple[Lesson, ...]
    waited_s: float


_END = object()


class TargetStream:
    """Batches of lessons, asked for ahead of the step on a thread of its own.

    Iterate over it; close it (or leave its context) to end the thread. An error on the way is raised from the
    iteration, in its place in the order.
    """

    def __init__(self, config: RunConfig, student: Vocabulary, batches: Iterable[Sequence[Sample]]) -> None:
        self._config = config
        self._student = student
        self._batches = iter(batches)
        self._queue: queue.Queue[object] = queue.Queue(maxsize=1)
        self._stopping = threading.Event()
        self._cancel: Callable[[], object] = lambda: None
        self._thread = threading.Thread(target=self._work, name="targets", daemon=True)
        self._thread.start()

    def __enter__(self) -> "TargetStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._stopping.set()
        self._cancel()
        self._thread.join(timeout=30)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            began = time.monotonic()
            item = self._queue.get()
            if item is _END:
                return
            if isinstance(item, BaseException):
                raise item
            assert isinstance(item, tuple)
            yield Batch(item, time.monotonic() - began)

    def _work(self) -> None:
        with suppress(asyncio.CancelledError):
            asyncio.run(self._produce())

    async def _produce(self) -> None:
        loop, main = asyncio.get_running_loop(), asyncio.current_task()
        assert main is not None
        self._cancel = lambda: loop.is_closed() or loop.call_soon_threadsafe(main.cancel)
        try:
            async with connected(self._config, self._student) as teachers:
                await self._run(teachers)
            await self._put(_END)
        except Exception as error:  # whatever it is, it is raised from the iteration
            await self._put(error)

    async def _run(self, teachers: Teachers) -> None:
        """Keep up to `prefetch_batches` batches under way; hand them over in order."""
        cache = _TargetCache(self._config.train.target_cache_bytes)
        ahead: asyncio.Queue[asyncio.Task[tuple[Lesson, ...]]] = asyncio.Queue(self._config.train.prefetch_batches)
        try:
            for samples in self._batches:
                if ahead.full():
                    await self._put(await ahead.get_nowait())
                ahead.put_nowait(asyncio.create_task(self._batch(teachers, cache, samples)))
                if self._stopping.is_set():
                    return
            while not ahead.empty():
                await self._put(await ahead.get_nowait())
        finally:
            while not ahead.empty():
                ahead.get_nowait().cancel()

    async def _batch(self, teachers: Teachers, cache: _TargetCache, samples: Sequence[Sample]) -> tuple[Lesson, ...]:
        known = {sample.index: cache.get(sample) for sample in samples}
        fresh = [sample for sample in samples if known[sample.index] is None]
        lessons = await together(teachers.lesson(sample) for sample in fresh)
        for lesson in lessons:
            cache.put(lesson)
        by_index = {lesson.sample.index: lesson for lesson in lessons}
        return tuple(known[s.index] or by_index[s.index] for s in samples)

    async def _put(self, item: object) -> None:
        """Into the bounded queue, without blocking the event loop; dropped when the reader has gone."""
        while not self._stopping.is_set():
            try:
                self._queue.put_nowait(item)
                return
            except queue.Full:
                await asyncio.sleep(0.005)


async def together(questions: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order; the first error ends the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(question) for question in questions]
    except BaseExceptionGroup as group_error:
        raise group_error.exceptions[0] from None
    return [task.result() for task in tasks]


def labels_of(lesson: Lesson, first_position: int) -> tuple[np.ndarray, Target | None]:
    """Tokens and target from the student's first predicted position on."""
    target = lesson.target
    return lesson.tokens.ids[first_position:], None if target is None else target.after(first_position)
