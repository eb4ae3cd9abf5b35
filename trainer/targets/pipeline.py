"""Batches of lessons, ahead of the step.

`TargetStream` reads, asks, aligns and fuses on threads of its own (asking.py, ahead.py, fuser.py): a slow step stops
the asking, a slow teacher starves the step and is named. Batches come out in the order they were asked for, whatever
the order of the answers, and a sample that comes again is not asked again while its answers are on their way or fit the
cache. Each rank has a stream and a cache of its own, over its own part of every batch.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from alignment import Target
from trainer.config import RunConfig
from trainer.data.reading import Reader
from trainer.data.samples import Sample
from trainer.targets.ahead import Ahead, Place
from trainer.targets.asking import Asked, Teachers, connected
from trainer.targets.fuser import Fuser, Lesson
from trainer.targets.threads import in_daemon_thread


@dataclass(frozen=True)
class LastAnswer:
    """The answer to a batch that came last: whose it was, when it was asked for and when it came."""

    teacher: str
    asked_at: float
    came_at: float

    def missing_s(self, begin: float, end: float) -> float:
        """For how much of a time, by time.monotonic(), it was awaited."""
        return max(min(end, self.came_at) - max(begin, self.asked_at), 0.0)


@dataclass(frozen=True)
class Batch:
    """Lessons in order, what they cost, how long the step waited for them, and what the fusion knew after them.

    num_skipped     chats that could not be read as every model writes them
    fleets          how each teacher's replicas did until then
    read_s, align_s, fuse_s  CPU seconds on threads beside the step
    last            the answer that came last; None where nothing was asked
    waited_s        how long the step waited; the first one not for the time to connect
    waited_on       by teacher: the part of waited_s in which the batch's last answer, which was its, was missing. The
                    rest went to reading, aligning and fusing
    queued_batches, queued_tokens  that were ready when the step came for this one; 0 if it had to wait
    """

    lessons: tuple[Lesson, ...]
    num_skipped: int
    fusion_state: dict[str, Any] | None
    fleets: Mapping[str, Mapping[str, float]]
    read_s: float
    align_s: float
    fuse_s: float
    last: LastAnswer | None
    waited_s: float = 0.0
    waited_on: Mapping[str, float] = field(default_factory=dict)
    queued_batches: int = 0
    queued_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(len(lesson.tokens) for lesson in self.lessons)

    @property
    def times(self) -> dict[str, float]:
        """How it came about, as the metrics file has it."""
        names = ("waited_s", "queued_batches", "queued_tokens", "read_s", "align_s", "fuse_s")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class _Ready:
    """A batch that waits for the step; `taken` is to be called, on the stream's thread, when it has it."""

    batch: Batch
    taken: Callable[[], None]


_END = object()


class TargetStream:
    """Batches of lessons, asked for ahead of the step on a thread of its own.

    Iterate over it; close it (or leave its context) to end the thread. An error on the way is raised from the
    iteration, in its place in the order.
    """

    def __init__(
        self,
        config: RunConfig,
        student: Reader,
        batches: Iterable[Sequence[Sample]],
        *,
        fuser: Fuser,
        first_step: int = 0,
    ) -> None:
        self._config = config
        self._student = student
        self._batches = iter(batches)
        self._fuser = fuser
        self._step = first_step
        self._ready: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._made = self._made_tokens = 0  # batches and their tokens, counted by the stream's thread alone
        self._taken = self._taken_tokens = 0  # counted by the step alone
        self._events: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._main: asyncio.Task[Any] | None = None
        self._stopping = self._closing = False
        self._began = self._connected = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="targets", daemon=True)
        self._thread.start()

    def __enter__(self) -> "TargetStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stop(self) -> None:
        """End the iteration, whatever it waits for. Asking and fusing go on until `close`: another rank that has not
        been stopped may need them for its batch.

        A signal handler may call it: SimpleQueue.put is reentrant.
        """
        self._stopping = True
        self._ready.put(_END)

    def close(self) -> None:
        self.stop()
        if not self._closing:  # a second time would end what the first time began
            self._closing = True
            self._tell(lambda: self._main and self._main.cancel())
        self._thread.join(timeout=30)

    @property
    def connect_s(self) -> float:
        """How long it took to connect to the teachers and to build translations; 0 until the first batch is there."""
        return self._connected - self._began

    def events(self) -> Iterator[dict[str, str]]:
        """Teachers that were lost or came back since the last call: kind, teacher, detail."""
        while not self._events.empty():
            yield self._events.get_nowait()

    def __iter__(self) -> Iterator[Batch]:
        while not self._stopping:
            began = time.monotonic()
            depth = self._made - self._taken, self._made_tokens - self._taken_tokens
            item = self._ready.get()
            if item is _END:
                return
            if isinstance(item, BaseException):
                raise item
            assert isinstance(item, _Ready)
            self._tell(item.taken)
            self._taken += 1
            self._taken_tokens += item.batch.num_tokens
            yield _waited_for(item.batch, max(began, self._connected), depth)

    def _tell(self, what: Callable[[], object]) -> None:
        """Have it done on the stream's thread, unless that has not begun or has ended."""
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(what)

    # --- on its thread ---

    def _work(self) -> None:
        try:
            asyncio.run(self._produce())
        except BaseException as error:  # a panic of a tokenizer's is no Exception; the step would wait for ever
            self._ready.put(error)

    async def _produce(self) -> None:
        self._main, self._loop = asyncio.current_task(), asyncio.get_running_loop()
        if self._stopping:  # before there was anybody to tell
            return
        try:
            async with connected(self._config, self._student, self._events.put) as teachers:
                self._connected = time.monotonic()
                try:
                    await self._make(teachers)
                finally:
                    self._main = None  # or it could be ended while it closes its connections
            self._ready.put(_END)
        except Exception as error:  # whatever it is, it is raised from the iteration
            self._ready.put(error)

    async def _make(self, teachers: Teachers) -> None:
        ahead = Ahead(self._config, teachers, self._batches)
        async with aclosing(ahead.batches()) as batches:
            async for answered in batches:
                batch = await self._fused([asked for asked, _ in answered], teachers)
                self._hand_over(batch, answered, ahead)
                del batch, answered  # while the next one is awaited

    def _hand_over(self, batch: Batch, answered: Sequence[tuple[Asked | None, Place]], ahead: Ahead) -> None:
        filled = [place for asked, place in answered if asked is not None]
        for lesson, place in zip(batch.lessons, filled, strict=True):
            place.settle(len(lesson.tokens), _nbytes(lesson))  # the answers are let go
        self._made += 1
        self._made_tokens += batch.num_tokens
        self._ready.put(_Ready(batch, partial(ahead.taken, [place for _, place in answered])))

    async def _fused(self, batch: Sequence[Asked | None], teachers: Teachers) -> Batch:
        """In the order of the batches."""
        usable = [asked for asked in batch if asked is not None]
        lessons, fuse_s = await in_daemon_thread(self._fuser.fuse, usable, self._step)
        self._step += 1
        answers = [
            LastAnswer(teacher.config.name, answer.timing.asked_at, answer.timing.came_at)
            for asked in usable
            for teacher, answer in zip(teachers.teachers, asked.answers, strict=True)
            if answer.timing is not None
        ]
        return Batch(
            lessons,
            len(batch) - len(usable),
            self._fuser.state,
            teachers.stats(),
            read_s=sum(asked.read_s for asked in usable),
            align_s=sum(a.timing.align_s for asked in usable for a in asked.answers if a.timing is not None),
            fuse_s=fuse_s,
            last=max(answers, key=lambda answer: answer.came_at, default=None),
        )


def _nbytes(lesson: Lesson) -> int:
    said = [one for one in (lesson.target, *lesson.unaligned) if one is not None]
    return lesson.reading.nbytes + sum(one.nbytes for one in said)


def _waited_for(batch: Batch, began: float, depth: tuple[int, int]) -> Batch:
    """With what the step saw of it, which came for it when it `began` to wait."""
    ended, last = time.monotonic(), batch.last
    missing_s = last.missing_s(began, ended) if last else 0.0
    return replace(
        batch,
        waited_s=max(ended - began, 0.0),
        waited_on={last.teacher: missing_s} if last and missing_s else {},
        queued_batches=depth[0],
        queued_tokens=depth[1],
    )


def labels_of(lesson: Lesson, first_position: int) -> tuple[np.ndarray, Target | None]:
    """Tokens and target of the supervised positions from the student's first predicted one on."""
    wanted = supervised_from(lesson, first_position)
    tokens = lesson.tokens.ids[first_position:][wanted]
    return tokens, None if lesson.target is None else lesson.target.after(first_position).take(wanted)


def supervised_from(lesson: Lesson, first_position: int) -> np.ndarray:
    """[T − first_position] bool: which of the predicted positions are learned from."""
    return lesson.reading.supervised_T[first_position:]
