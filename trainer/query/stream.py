"""Training batches, produced ahead of the training step.

`ExampleStream` connects to the teachers, scores samples (prefetch.py) and fuses their targets (trainer/fusion/) on
background threads. If the step is slow, the limits on samples in flight pause the requests. If a teacher is slow, the
step waits, and the telemetry names the teacher. Batches are in the order of the data, independent of the order of the
responses. Every process has a stream for its own shard of each batch.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from teachers.client.events import TeacherEvent
from teachers.protocol.messages import TeacherCard
from trainer.config import RunConfig
from trainer.fusion.run_fuser import Fuser
from trainer.query.background import in_daemon_thread
from trainer.query.connect import TeacherConnection, connect_teachers, gather
from trainer.query.prefetch import Prefetcher, PrefetchLimits, Reservation, Scored
from trainer.query.rollout_counts import count_rollout
from trainer.query.score import SampleScorer
from trainer.records import Batch, DistillationExample, Sample, ScoredSample
from trainer.telemetry.collector import Collector, merged
from trainer.tokenization import SampleTokenizer


@dataclass(frozen=True)
class _Ready:
    """A batch in the queue. `taken` is called on the stream's thread when the step has taken the batch."""

    batch: Batch
    telemetry: Collector
    taken: Callable[[], None]


_END = object()


def prefetch_limits(config: RunConfig) -> PrefetchLimits:
    """Return the limits of a run file. Scores are cached only if some sample is used more than once."""
    reused = config.train.epochs > 1 or any(source.weight > 1 for source in config.data.sources)
    return PrefetchLimits(
        max_tokens=config.train.prefetch_tokens,
        max_bytes=config.train.prefetch_bytes,
        cache_bytes=config.train.target_cache_bytes if reused else 0,
        window_tokens=config.data.window_tokens + (config.data.close_documents or config.rollout is not None),
        top_k=tuple(teacher.top_k for teacher in config.teachers),
    )


class ExampleStream:
    """Iterable over training batches and their telemetry, which a background thread produces.

    `close`, or the end of a `with` block, ends the thread. An error is raised from the iteration, after the batches
    that are complete.
    """

    def __init__(
        self,
        config: RunConfig,
        student: SampleTokenizer,
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
        self._num_made = self._made_tokens = 0  # written by the stream's thread only
        self._num_taken = self._taken_tokens = 0  # written by the step's thread only
        self._events: queue.SimpleQueue[TeacherEvent] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._main: asyncio.Task[Any] | None = None
        self._scorer: SampleScorer | None = None
        self._cards: dict[str, TeacherCard] = {}
        self._tokenizers: dict[str, SampleTokenizer] = {}
        self._stopping = self._closing = self._failed = False
        self._began = self._connected = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="stream", daemon=True)
        self._thread.start()

    def __enter__(self) -> "ExampleStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stop(self) -> None:
        """End the iteration, even while it waits. A signal handler may call this: SimpleQueue.put is reentrant.

        Scoring and fusing continue until `close`: another process that has not been stopped may need this one for its
        batch.
        """
        self._stopping = True
        self._ready.put(_END)

    def close(self) -> None:
        """Stop, and end the thread."""
        self.stop()
        if not self._closing:  # a second cancellation would interrupt the cleanup of the first one
            self._closing = True
            self._call_soon(lambda: self._main and self._main.cancel())
        self._thread.join(timeout=30)

    def is_stopped(self) -> bool:
        """Whether `stop` or `close` was called."""
        return self._stopping

    def has_ended(self) -> bool:
        """Return whether the iteration ends before another batch: after `stop` or `close`, or by an error."""
        return self._stopping or self._failed

    @property
    def connect_s(self) -> float:
        """Seconds that connecting to the teachers and building their signals took; 0 before the first batch."""
        return self._connected - self._began

    @property
    def tokenizers(self) -> dict[str, SampleTokenizer]:
        """Tokenizers of the teachers by name; complete once the first batch has been returned."""
        return self._tokenizers

    @property
    def cards(self) -> dict[str, TeacherCard]:
        """Cards of the teachers by name; empty before the first batch."""
        return self._cards

    def events(self) -> Iterator[TeacherEvent]:
        """Yield the events of teachers (lost, joined again) since the last call."""
        while not self._events.empty():
            yield self._events.get_nowait()

    def score(self, samples: Sequence[Sample]) -> list[ScoredSample]:
        """Score samples outside the batches, through the same connection. Call it after the first batch.

        Skipped chats are left out. Raises the errors of the teachers.
        """
        if not samples:
            return []
        assert self._loop is not None, "wait for the first batch"
        assert self._scorer is not None
        return asyncio.run_coroutine_threadsafe(self._score(self._scorer, samples), self._loop).result()

    @staticmethod
    async def _score(scorer: SampleScorer, samples: Sequence[Sample]) -> list[ScoredSample]:
        scored = await gather(scorer.score(sample, Collector()) for sample in samples)
        return [one for one in scored if one is not None]

    def __iter__(self) -> Iterator[tuple[Batch, Collector]]:
        while not self._stopping:
            began = time.monotonic()
            queued = self._num_made - self._num_taken, self._made_tokens - self._taken_tokens
            item = self._ready.get()
            if item is _END:
                return
            if isinstance(item, BaseException):
                raise item
            assert isinstance(item, _Ready)
            self._call_soon(item.taken)
            self._num_taken += 1
            self._taken_tokens += item.batch.num_tokens
            item.telemetry.queued_batches, item.telemetry.queued_tokens = queued
            item.telemetry.wait(max(began, self._connected), time.monotonic())
            yield item.batch, item.telemetry

    def _call_soon(self, function: Callable[[], object]) -> None:
        """Call a function on the stream's thread, unless the thread has not started its event loop or has ended."""
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(function)

    # --- on the stream's thread ---

    def _run(self) -> None:
        try:
            asyncio.run(self._produce())
        except BaseException as error:  # a Rust panic in a tokenizer is not an Exception; the step would wait forever
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self._failed = True
        self._ready.put(error)

    async def _produce(self) -> None:
        self._main, self._loop = asyncio.current_task(), asyncio.get_running_loop()
        if self._stopping:  # stopped before there was a loop to notify
            return
        config = self._config
        try:
            async with connect_teachers(
                config.teachers,
                self._student,
                data=config.data,
                closes_texts=config.rollout is not None,
                on_event=self._events.put,
            ) as connection:
                self._connected, self._cards = time.monotonic(), connection.cards
                self._tokenizers = {teacher.config.name: teacher.tokenizer for teacher in connection.teachers}
                self._scorer = SampleScorer(connection, self._student, config.data)
                try:
                    await self._produce_batches(self._scorer, connection)
                    self._ready.put(_END)
                    await asyncio.Event().wait()  # `score` uses the connection until `close` cancels this task
                finally:
                    self._main = None  # a second cancellation must not interrupt the closing of connections
        except Exception as error:  # raised from the iteration
            self._fail(error)

    async def _produce_batches(self, scorer: SampleScorer, connection: TeacherConnection) -> None:
        prefetcher = Prefetcher(prefetch_limits(self._config), scorer, self._batches)
        async with aclosing(prefetcher.batches()) as batches:
            async for scored in batches:
                telemetry = merged(one.telemetry for one, _ in scored)
                batch = await self._fuse([one.sample for one, _ in scored if one.sample is not None], telemetry)
                for name, stats in connection.pool.stats().items():
                    telemetry.teacher(name).pool = asdict(stats)
                self._put(batch, telemetry, scored, prefetcher)
                del batch, scored  # release their memory while the next batch is awaited

    async def _fuse(self, scored: Sequence[ScoredSample], telemetry: Collector) -> Batch:
        """Fuse a batch. Batches are fused in order, because the fusion may have state."""
        examples, seconds = await in_daemon_thread(self._fuser.fuse, scored, self._step, telemetry)
        telemetry.record("fuse", seconds)
        first_position = 0 if self._student.prefix else 1
        for example in examples:
            _record_target(example, first_position, telemetry)
            telemetry.rollouts.add(count_rollout(example, self._step, first_position))
        self._step += 1
        return Batch(examples, self._fuser.state)

    def _put(
        self,
        batch: Batch,
        telemetry: Collector,
        scored: Sequence[tuple[Scored, Reservation]],
        prefetcher: Prefetcher,
    ) -> None:
        used = [reservation for one, reservation in scored if one.sample is not None]
        for example, reservation in zip(batch.examples, used, strict=True):
            reservation.resize(len(example.tokenized), example.nbytes)  # the scores are released
        self._num_made += 1
        self._made_tokens += batch.num_tokens
        taken = partial(prefetcher.taken, [reservation for _, reservation in scored])
        self._ready.put(_Ready(batch, telemetry, taken))


def _record_target(example: DistillationExample, first_position: int, telemetry: Collector) -> None:
    telemetry.examples += 1
    _, target = example.labels(first_position)
    if target is not None:
        telemetry.positions += len(target)
        telemetry.valid += int(target.valid.sum())
        telemetry.mass += float(target.mass.sum())
        telemetry.tail += float(target.tail.sum())
