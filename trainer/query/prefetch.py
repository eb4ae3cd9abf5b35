"""Score samples ahead of the training step, within a memory budget, and return whole batches in order.

Every sample is tokenized, requested and aligned in its own task, so that a slow response delays only its own
batch. All tasks run in one event loop.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from trainer.query.score import SampleScorer
from trainer.records import Sample, ScoredSample
from trainer.telemetry.collector import Collector

CANDIDATE_BYTES = 20  # per candidate of a response: 6 on the wire, 4 decoded, 8 aligned, and a share of each row


class MemoryBudget:
    """Budget of student tokens and bytes for the samples in flight.

    Sizes are estimates until they can be measured; a measured size may exceed the limits.
    """

    def __init__(self, max_tokens: int, max_bytes: int) -> None:
        self._max_tokens, self._max_bytes = max_tokens, max_bytes
        self.tokens = self.nbytes = 0
        self._changed = asyncio.Event()

    async def wait(self, tokens: int, nbytes: int, is_due: Callable[[], bool]) -> None:
        """Wait until `tokens` and `nbytes` fit, or until `is_due` returns true, tested after every change."""
        while not (is_due() or self._fits(tokens, nbytes)):
            self._changed.clear()
            await self._changed.wait()

    def reserve(self, tokens: int, nbytes: int) -> "Reservation":
        """Reserve `tokens` and `nbytes`, even beyond the limits: call `wait` first."""
        reservation = Reservation(self)
        reservation.resize(tokens, nbytes)
        return reservation

    def change(self, tokens: int, nbytes: int) -> None:
        """Add to the reserved amounts; negative numbers release."""
        self.tokens += tokens
        self.nbytes += nbytes
        self._changed.set()

    def _fits(self, tokens: int, nbytes: int) -> bool:
        return self.tokens + tokens <= self._max_tokens and self.nbytes + nbytes <= self._max_bytes


class Reservation:
    """The part of a MemoryBudget that one sample uses."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self._tokens = self._nbytes = 0

    def resize(self, tokens: int, nbytes: int) -> None:
        """Set the size of the reservation."""
        self._budget.change(tokens - self._tokens, nbytes - self._nbytes)
        self._tokens, self._nbytes = tokens, nbytes

    def release(self) -> None:
        """Return everything to the budget."""
        self.resize(0, 0)


class Scored(NamedTuple):
    """The scores of one sample (None for a skipped chat) and its telemetry."""

    sample: ScoredSample | None
    telemetry: Collector


class _ScoreCache:
    """Scores by sample index. Requests in flight are shared; results are kept up to a number of bytes.

    Fused targets are not kept: teacher weights may change with the step.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: dict[int, Scored] = {}
        self._in_flight: dict[int, asyncio.Task[Scored]] = {}
        self._nbytes = 0

    async def get(self, sample: Sample, score: Callable[[], Coroutine[Any, Any, Scored]]) -> Scored:
        """Return cached scores, or the result of a request in flight, or that of a new request."""
        if sample.rollout is not None or sample.refusal is not None:  # the index is that of the given text
            return await score()
        if sample.index in self._kept:
            return self._kept[sample.index]
        if sample.index in self._in_flight:
            return _without_cost(await self._in_flight[sample.index])
        task = self._in_flight[sample.index] = asyncio.create_task(score())
        try:
            scored = await task
        finally:
            del self._in_flight[sample.index]
        self._keep(sample, scored)
        return scored

    def _keep(self, sample: Sample, scored: Scored) -> None:
        if scored.sample is not None and any(scores.unavailable for scores in scored.sample.scores):
            return  # the teacher may be available when the sample is used again
        nbytes = 0 if scored.sample is None else scored.sample.nbytes
        if self._nbytes + nbytes <= self._max_bytes:
            self._kept[sample.index] = _without_cost(scored)
            self._nbytes += nbytes


def _without_cost(scored: Scored) -> Scored:
    return Scored(scored.sample, scored.telemetry.without_cost())


@dataclass(frozen=True)
class PrefetchLimits:
    """Limits of scoring ahead of the training step.

    max_tokens     student tokens in flight
    max_bytes      bytes of scores and targets in flight
    cache_bytes    bytes for the scores of samples that are used again
    window_tokens  longest sample in student tokens, EOS included
    top_k          candidates per position of each teacher
    """

    max_tokens: int
    max_bytes: int
    cache_bytes: int
    window_tokens: int
    top_k: tuple[int, ...]

    @property
    def max_sample(self) -> tuple[int, int]:
        """Tokens and bytes of the largest sample."""
        return self.window_tokens, self.window_tokens * sum(self.top_k) * CANDIDATE_BYTES


_StartedBatch = list[tuple[asyncio.Task[Scored], Reservation]]


class Prefetcher:
    """Scores all batches of a run. The consumer calls `taken` for each batch that it has taken."""

    def __init__(self, limits: PrefetchLimits, scorer: SampleScorer, batches: Iterator[Sequence[Sample]]) -> None:
        self._limits = limits
        self._scorer = scorer
        self._batches = batches
        self._budget = MemoryBudget(limits.max_tokens, limits.max_bytes)
        self._cache = _ScoreCache(limits.cache_bytes)
        self._started = asyncio.Queue[_StartedBatch | None]()
        self._tasks = set[asyncio.Task[Scored]]()
        self._num_started = self._num_taken = 0

    def taken(self, reservations: Sequence[Reservation]) -> None:
        """Release the reservations of the next batch, which the step has taken."""
        self._num_taken += 1
        for reservation in reservations:
            reservation.release()

    async def batches(self) -> AsyncGenerator[list[tuple[Scored, Reservation]], None]:
        """Yield batches in order. The error of a sample is raised instead of its batch."""
        producer = asyncio.create_task(self._start_all())
        try:
            while (started := await self._started.get()) is not None:
                yield [(await task, reservation) for task, reservation in started]
                self._tasks.difference_update(task for task, _ in started)
                del started  # release its scores while the next batch is awaited
            await producer
        finally:
            unfinished = [producer, *self._tasks]
            for task in unfinished:
                task.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)

    async def _start_all(self) -> None:
        """Start samples in order, each when a whole window fits. Samples of the step's next batch do not wait."""
        try:
            while await self._wait() and (samples := await asyncio.to_thread(next, self._batches, None)) is not None:
                self._started.put_nowait([await self._start(sample) for sample in samples])
                self._num_started += 1
        finally:
            self._started.put_nowait(None)

    async def _start(self, sample: Sample) -> tuple[asyncio.Task[Scored], Reservation]:
        await self._wait()
        reservation = self._budget.reserve(*self._limits.max_sample)
        task = asyncio.create_task(self._score(sample, reservation))
        self._tasks.add(task)
        return task, reservation

    async def _wait(self) -> bool:
        """Wait until a sample may start. Return True, so that a loop condition can contain the call."""
        await self._budget.wait(*self._limits.max_sample, lambda: self._num_started == self._num_taken)
        return True

    async def _score(self, sample: Sample, reservation: Reservation) -> Scored:
        """Score one sample, and resize its reservation as its size becomes known."""

        async def score() -> Scored:
            telemetry = Collector()
            tokenizations = await self._scorer.tokenize(sample, telemetry)
            if tokenizations is None:
                return Scored(None, telemetry)
            pairs = zip(tokenizations.teachers, self._limits.top_k, strict=True)
            candidates = sum(len(tokenized) * top_k for tokenized, top_k in pairs)
            reservation.resize(len(tokenizations.student), candidates * CANDIDATE_BYTES)
            return Scored(await self._scorer.request(tokenizations, telemetry), telemetry)

        scored = await self._cache.get(sample, score)
        if scored.sample is None:
            reservation.release()
        else:
            reservation.resize(len(scored.sample.tokenized), scored.sample.nbytes)
        return scored
