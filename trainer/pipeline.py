"""Batches of lessons, ahead of the step.

`TargetStream` asks, aligns and fuses on a thread of its own (asking.py, fuser.py): batches come out in the order they
were asked for, whatever the order of the answers, and a sample that comes again is not asked again while its answers
fit the cache.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from alignment import Target
from trainer.asking import Asked, Teachers, connected, together
from trainer.config import RunConfig
from trainer.data import Sample
from trainer.errors import DataError
from trainer.fuser import Fuser, Lesson
from trainer.reading import Reader


class _AnswerCache:
    """Aligned answers by sample index, in memory, until a number of bytes is reached; then new ones are not kept.

    Not their fusion: weights may move with the step and with what was seen.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._known: dict[int, Asked | None] = {}
        self.nbytes = 0

    def __contains__(self, sample: Sample) -> bool:
        return sample.index in self._known

    def __getitem__(self, sample: Sample) -> Asked | None:
        return self._known[sample.index]

    def put(self, sample: Sample, asked: Asked | None) -> None:
        nbytes = 0
        if asked is not None:
            asked = replace(asked, answers=tuple(answer.without_rows() for answer in asked.answers))
            nbytes = asked.reading.nbytes + sum(answer.nbytes for answer in asked.answers)
        if asked is not None and any(answer.absent for answer in asked.answers):
            return  # a teacher that is back by then is asked
        if sample.index not in self._known and self.nbytes + nbytes <= self._limit:
            self._known[sample.index] = asked
            self.nbytes += nbytes


@dataclass(frozen=True)
class Batch:
    """Lessons in order, how long the step waited for them, and what the fusion knew after them.

    num_skipped counts chats that could not be read as every model writes them; fleets says how each teacher's replicas
    did until then.
    """

    lessons: tuple[Lesson, ...]
    waited_s: float
    num_skipped: int = 0
    fusion_state: dict[str, Any] | None = None
    fleets: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


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
        self._queue: queue.Queue[object] = queue.Queue(maxsize=1)
        self._events: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._cancel: Callable[[], object] = lambda: None
        self._thread = threading.Thread(target=self._work, name="targets", daemon=True)
        self._thread.start()

    def __enter__(self) -> "TargetStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stop(self) -> None:
        """End the iteration, whatever it waits for. A signal handler may call it."""
        self._stopping.set()
        self._cancel()

    def close(self) -> None:
        self.stop()
        self._thread.join(timeout=30)

    def events(self) -> Iterator[dict[str, str]]:
        """Teachers that were lost or came back since the last call: kind, teacher, detail."""
        while not self._events.empty():
            yield self._events.get_nowait()

    def __iter__(self) -> Iterator[Batch]:
        while True:
            began = time.monotonic()
            while (item := self._next()) is None:
                if self._stopping.is_set():
                    return
            if item is _END:
                return
            if isinstance(item, BaseException):
                raise item
            assert isinstance(item, Batch)
            yield replace(item, waited_s=time.monotonic() - began)

    def _next(self) -> object | None:
        """What comes within half a second; a signal handler cannot put anything into a queue that is being read."""
        with suppress(queue.Empty):
            return self._queue.get(timeout=0.5)
        return None

    def _work(self) -> None:
        with suppress(asyncio.CancelledError):
            asyncio.run(self._produce())

    async def _produce(self) -> None:
        loop, main = asyncio.get_running_loop(), asyncio.current_task()
        assert main is not None
        self._cancel = lambda: loop.is_closed() or loop.call_soon_threadsafe(main.cancel)
        try:
            async with connected(self._config, self._student, self._events.put) as teachers:
                await self._run(teachers)
            await self._put(_END)
        except Exception as error:  # whatever it is, it is raised from the iteration
            await self._put(error)

    async def _run(self, teachers: Teachers) -> None:
        """Keep up to `prefetch_batches` batches under way; hand them over in order."""
        cache = _AnswerCache(self._config.train.target_cache_bytes)
        ahead: asyncio.Queue[asyncio.Task[list[Asked | None]]] = asyncio.Queue(self._config.train.prefetch_batches)
        try:
            for samples in self._batches:
                if ahead.full():
                    await self._hand_over(await ahead.get_nowait(), teachers)
                ahead.put_nowait(asyncio.create_task(self._batch(teachers, cache, samples)))
                if self._stopping.is_set():
                    return
            while not ahead.empty():
                await self._hand_over(await ahead.get_nowait(), teachers)
        finally:
            while not ahead.empty():
                ahead.get_nowait().cancel()

    async def _batch(self, teachers: Teachers, cache: _AnswerCache, samples: Sequence[Sample]) -> list[Asked | None]:
        known = {sample.index: cache[sample] for sample in samples if sample in cache}
        fresh = [sample for sample in samples if sample.index not in known]
        for sample, asked in zip(fresh, await together(teachers.ask(sample) for sample in fresh), strict=True):
            cache.put(sample, asked)
            known[sample.index] = asked
        return [known[sample.index] for sample in samples]

    async def _hand_over(self, batch: list[Asked | None], teachers: Teachers) -> None:
        """Fuse, in the order of the batches, and pass on."""
        usable = [asked for asked in batch if asked is not None]
        if not usable:
            raise DataError(
                f"all {len(batch)} chats of step {self._step + 1} cannot be read and were skipped: mend the data, or "
                "raise train.batch_samples"
            )
        lessons = await asyncio.to_thread(self._fuser.fuse, usable, self._step)
        self._step += 1
        await self._put(Batch(lessons, 0.0, len(batch) - len(usable), self._fuser.state, teachers.stats()))

    async def _put(self, item: object) -> None:
        """Into the bounded queue, without blocking the event loop; dropped when the reader has gone."""
        while not self._stopping.is_set():
            try:
                self._queue.put_nowait(item)
                return
            except queue.Full:
                await asyncio.sleep(0.005)


def labels_of(lesson: Lesson, first_position: int) -> tuple[np.ndarray, Target | None]:
    """Tokens and target of the supervised positions from the student's first predicted one on."""
    wanted = supervised_from(lesson, first_position)
    tokens = lesson.tokens.ids[first_position:][wanted]
    return tokens, None if lesson.target is None else lesson.target.after(first_position).take(wanted)


def supervised_from(lesson: Lesson, first_position: int) -> np.ndarray:
    """[T − first_position] bool: which of the predicted positions are learned from."""
    return lesson.reading.supervised_T[first_position:]
