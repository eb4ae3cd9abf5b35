"""Samples asked for ahead of the step, as far as there is room for them: beyond it nothing is read and nothing asked.

`Ahead` reads, asks and aligns sample by sample, so that a slow answer keeps back its own batch only, and gives whole
batches in their order. All of it lives in one event loop.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from typing import Any

from trainer.config import RunConfig
from trainer.data.samples import Sample
from trainer.targets.asking import Asked, Teachers

CANDIDATE_BYTES = 20  # of an answer and its target: 6 on the wire, 4 decoded, 8 aligned, and a little beside each row


class Room:
    """Bounds on what is under way, in the student's tokens and in bytes.

    What turns out larger than it was taken for may exceed them: bytes are estimated until they can be measured.
    """

    def __init__(self, most_tokens: int, most_bytes: int) -> None:
        self._most_tokens, self._most_bytes = most_tokens, most_bytes
        self.tokens = self.nbytes = 0
        self._changed = asyncio.Event()

    async def wait(self, tokens: int, nbytes: int, is_due: Callable[[], bool]) -> None:
        """Until so much more fits, or until it is due whatever the bounds."""
        while not (is_due() or self._fits(tokens, nbytes)):
            self._changed.clear()
            await self._changed.wait()

    def take(self, tokens: int, nbytes: int) -> "Place":
        """So much of it, or beyond it: `wait` first."""
        place = Place(self)
        place.settle(tokens, nbytes)
        return place

    def change(self, tokens: int, nbytes: int) -> None:
        """So much more is taken, or less; who waits looks again."""
        self.tokens += tokens
        self.nbytes += nbytes
        self._changed.set()

    def _fits(self, tokens: int, nbytes: int) -> bool:
        return self.tokens + tokens <= self._most_tokens and self.nbytes + nbytes <= self._most_bytes


class Place:
    """What one sample takes of a Room."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._tokens = self._nbytes = 0

    def settle(self, tokens: int, nbytes: int) -> None:
        """It takes this much now."""
        self._room.change(tokens - self._tokens, nbytes - self._nbytes)
        self._tokens, self._nbytes = tokens, nbytes


class _Answers:
    """Aligned answers by sample index: those under way are shared, later ones kept until a number of bytes is reached.

    Not their fusion: weights may move with the step and with what was seen.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._known: dict[int, Asked | None] = {}
        self._under_way: dict[int, asyncio.Task[Asked | None]] = {}
        self._nbytes = 0

    async def of(self, sample: Sample, ask: Callable[[], Coroutine[Any, Any, Asked | None]]) -> Asked | None:
        """From memory, from who asks already, or by asking."""
        if sample.index in self._known:
            return self._known[sample.index]
        if sample.index in self._under_way:
            asked = await self._under_way[sample.index]
            return None if asked is None else asked.without_cost()
        task = self._under_way[sample.index] = asyncio.create_task(ask())
        try:
            asked = await task
        finally:
            del self._under_way[sample.index]
        self._keep(sample, asked)
        return asked

    def _keep(self, sample: Sample, asked: Asked | None) -> None:
        if asked is not None and any(answer.absent for answer in asked.answers):
            return  # a teacher that is back by then is asked
        nbytes = 0 if asked is None else asked.nbytes
        if self._nbytes + nbytes <= self._limit:
            self._known[sample.index] = None if asked is None else asked.without_cost()
            self._nbytes += nbytes


Begun = list[tuple[asyncio.Task[Asked | None], Place]]


class Ahead:
    """All batches of a run, answered. Whoever has taken one says so: that makes room, and the next one is due."""

    def __init__(self, config: RunConfig, teachers: Teachers, batches: Iterator[Sequence[Sample]]) -> None:
        self._teachers = teachers
        self._batches = batches
        self._top_k = [teacher.top_k for teacher in config.teachers]
        self._window = config.data.window_tokens + config.data.close_documents
        self._room = Room(config.train.prefetch_tokens, config.train.prefetch_bytes)
        again = config.train.epochs > 1 or any(source.weight > 1 for source in config.data.sources)
        self._answers = _Answers(config.train.target_cache_bytes if again else 0)
        self._begun = asyncio.Queue[Begun | None]()
        self._tasks = set[asyncio.Task[Asked | None]]()
        self._num_begun = self._num_taken = 0

    def taken(self, places: Sequence[Place]) -> None:
        """The step has the next batch, which took these places."""
        self._num_taken += 1
        for place in places:
            place.settle(0, 0)

    async def batches(self) -> AsyncGenerator[list[tuple[Asked | None, Place]], None]:
        """In order; None stands for a chat that was skipped. Raises what asking raises, in its place in the order."""
        asking = asyncio.create_task(self._ask_all())
        try:
            while (begun := await self._begun.get()) is not None:
                yield [(await task, place) for task, place in begun]
                self._tasks.difference_update(task for task, _ in begun)
                del begun  # their answers, while the next batch is awaited
            await asking
        finally:
            unfinished = [asking, *self._tasks]
            for task in unfinished:
                task.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)

    async def _ask_all(self) -> None:
        """One sample after the other, while there is room for a whole window or the step's next batch is not whole."""
        try:
            while (
                await self._room_for_one()
                and (samples := await asyncio.to_thread(next, self._batches, None)) is not None
            ):
                self._begun.put_nowait([await self._begin(sample) for sample in samples])
                self._num_begun += 1
        finally:
            self._begun.put_nowait(None)

    async def _begin(self, sample: Sample) -> tuple[asyncio.Task[Asked | None], Place]:
        await self._room_for_one()
        place = self._room.take(*self._most)
        task = asyncio.create_task(self._one(sample, place))
        self._tasks.add(task)
        return task, place

    async def _room_for_one(self) -> bool:
        await self._room.wait(*self._most, lambda: self._num_begun == self._num_taken)
        return True

    @property
    def _most(self) -> tuple[int, int]:
        """Tokens and bytes that a sample may take, before it is read."""
        return self._window, self._window * sum(self._top_k) * CANDIDATE_BYTES

    async def _one(self, sample: Sample, place: Place) -> Asked | None:
        """Read, asked and aligned; its place settled to what is known of it."""

        async def ask() -> Asked | None:
            read = await self._teachers.read(sample)
            if read is None:
                return None
            candidates = sum(len(own) * top_k for own, top_k in zip(read.own, self._top_k, strict=True))
            place.settle(len(read.reading), candidates * CANDIDATE_BYTES)
            return (await self._teachers.answers(read)).without_rows()

        asked = await self._answers.of(sample, ask)
        place.settle(*((len(asked.reading), asked.nbytes) if asked else (0, 0)))
        return asked
