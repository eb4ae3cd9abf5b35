"""One engine behind limits: admission of requests, deadlines, cancellation and streaming of responses.

This module contains no HTTP: app.py serves it with FastAPI, vllm_plugin.py in a vLLM server, ray_serve.py in Ray.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import contextmanager
from functools import partial
from weakref import WeakSet

from prometheus_client import CollectorRegistry

from teachers.backlog import Backlog, retry_after_s
from teachers.engines.base import ChosenIdsEngine, Engine
from teachers.protocol.errors import EngineDead, TeacherError
from teachers.protocol.messages import ScoreRequest
from teachers.protocol.rows import Rows
from teachers.protocol.wire_format import StreamWriter
from teachers.server.admission import Rejection, check_request
from teachers.server.limits import Limits
from teachers.server.metrics import metrics_of, new_registry
from teachers.server.request_log import RequestRecord

log = logging.getLogger("tutelage.teacher")
CHECK_TIMEOUT_S = 20.0
PROGRESS_S = 15.0  # an engine that started or finished a sequence within this time works, however long its queue is
Task = asyncio.Task[tuple[int, Rows]]


class Service:
    """Admit requests, count queued tokens and stream scores as they are finished.

    `engine` may be set after construction; until then every request is rejected with 503. The metrics are in
    `registry`, by default a new one.
    """

    def __init__(
        self, engine: Engine | None = None, limits: Limits = Limits(), registry: CollectorRegistry | None = None
    ) -> None:
        self.limits = limits
        self.registry = new_registry() if registry is None else registry
        self.metrics = metrics_of(self.registry)
        self._backlog = Backlog()
        self._num_bodies = 0
        self._streams: WeakSet[ScoreStream] = WeakSet()
        self._drained_at: float | None = None
        self._checking: asyncio.Task[None] | None = None
        self.dead = False  # the engine needs a new process
        self._engine: Engine | None = None
        if engine is not None:
            self.engine = engine

    @property
    def engine(self) -> Engine:
        """The engine. Raises Rejection while there is none."""
        if self._engine is None:
            raise Rejection(503, "Starting", "the engine is still starting: retry later", retry_after_s=5)
        return self._engine

    @engine.setter
    def engine(self, engine: Engine) -> None:
        self._engine = engine
        self.metrics.info.labels(engine.card.model, engine.card.fingerprint, engine.card.engine).set(1)

    @property
    def queued_tokens(self) -> int:
        """Tokens of all unfinished sequences."""
        return self._backlog.tokens

    @property
    def idle(self) -> bool:
        """Whether no request is in flight."""
        return not self._backlog.tokens and not self._streams

    @property
    def draining(self) -> bool:
        """Whether `drain` was called."""
        return self._drained_at is not None

    def drain(self, seconds: float) -> None:
        """Reject new requests from now on. `seconds` is the time for the requests in flight."""
        self._drained_at = time.monotonic() + seconds

    def require_open(self) -> None:
        """Raise Rejection if the service is draining."""
        if self._drained_at is not None:
            wait_s = retry_after_s(self._drained_at - time.monotonic())
            raise Rejection(
                503, "Draining", "this server is stopping: use another replica or retry", wait_s, close=True
            )

    @contextmanager
    def receiving_body(self) -> Iterator[None]:
        """Count one request body that is being received. Raises Rejection if there are too many."""
        self.require_open()
        if self._num_bodies >= self.limits.max_bodies:
            detail = f"{self._num_bodies} requests are being received: retry later"
            raise Rejection(503, "Too many at once", detail, 1, close=True)
        self._num_bodies += 1
        try:
            yield
        finally:
            self._num_bodies -= 1

    def new_record(self, peer: str | None, route: str) -> RequestRecord:
        """Return the record of a request that has arrived."""
        return RequestRecord(self.metrics, peer, route)

    async def check(self) -> None:
        """Check that the engine works. Raises Rejection.

        A busy engine passes if it made progress recently. An idle engine scores a token, once for concurrent checks.
        """
        self.require_open()
        engine = self.engine
        if self._backlog.tokens and time.monotonic() - self._backlog.progress_at < PROGRESS_S:
            return
        if self._checking is None or self._checking.done():
            self._checking = asyncio.create_task(asyncio.wait_for(engine.check(), CHECK_TIMEOUT_S))
        try:
            await asyncio.shield(self._checking)
        except Exception as error:  # any error of the engine is the result of the check
            self.dead |= isinstance(error, EngineDead)
            self.metrics.engine_ready.set(0)
            raise Rejection(503, "Not ready", f"the engine does not respond: {type(error).__name__}") from error
        self.metrics.engine_ready.set(1)

    def score(
        self, request: ScoreRequest, timeout_s: float | None = None, record: RequestRecord | None = None
    ) -> "ScoreStream":
        """Admit a request, start the work and return the stream of its response. Raises Rejection.

        Close the stream, whether or not it was read: closing cancels the unfinished work.
        """
        record = record or self.new_record(None, "score")
        record.describe(request)
        try:
            self._admit(request)
        except Rejection as rejection:
            record.reject(rejection.problem.status, rejection.reason)
            raise
        record.admit()
        max_s = self.limits.max_seconds
        deadline = asyncio.get_running_loop().time() + min(timeout_s or max_s, max_s)
        tasks = [self._start(request, i, deadline) for i in range(len(request.sequences))]
        writer = StreamWriter(request, self.engine.card.fingerprint)
        return ScoreStream(self, tasks, writer, record)

    def _admit(self, request: ScoreRequest) -> None:
        self.require_open()
        check_request(request, self.engine.card, self.limits)
        queued, limit = self._backlog.tokens, self.limits.max_queued_tokens
        excess = queued + sum(map(len, request.sequences)) - limit
        if excess > 0:
            detail = f"{queued} of {limit} tokens are queued: retry later"
            raise Rejection(503, "Queue full", detail, self._backlog.wait_s(excess))

    def _start(self, request: ScoreRequest, index: int, deadline: float) -> Task:
        """Start one sequence. Its tokens are queued from here until the task ends, even if the task never runs."""
        tokens = len(request.sequences[index])
        self._backlog.enter(tokens)
        self.metrics.queued_tokens.inc(tokens)
        task = asyncio.create_task(self._score_sequence(request, index, deadline))
        task.add_done_callback(partial(self._finish, tokens))
        return task

    def _finish(self, tokens: int, task: Task) -> None:
        self._backlog.leave(tokens, finished=not task.cancelled() and task.exception() is None)
        self.metrics.queued_tokens.dec(tokens)

    async def _score_sequence(self, request: ScoreRequest, index: int, deadline: float) -> tuple[int, Rows]:
        began = time.monotonic()
        async with asyncio.timeout_at(deadline):
            arguments = (request.sequences[index], request.starts[index], request.top_k)
            if not request.chosen:
                rows = await self.engine.score(*arguments)
            elif isinstance(self.engine, ChosenIdsEngine):
                rows = await self.engine.score_chosen(*arguments, request.chosen[index])
            else:
                raise TeacherError(f"{self.engine.card.engine} has max_chosen in its card, but scores no chosen ids")
        self.metrics.engine_seconds.observe(time.monotonic() - began)
        self.metrics.engine_ready.set(1)
        self.metrics.sequences_scored.inc()
        self.metrics.tokens_scored.inc(len(rows))
        return index, rows


class ScoreStream:
    """The chunks of one Arrow stream, as the sequences are finished. An incomplete stream has no end marker.

    The work starts before the first chunk is read, so `aclose` cancels it even if no chunk was ever read. A plain async
    generator would not: closing one that has not started runs none of its code.
    """

    def __init__(self, service: Service, tasks: list[Task], writer: StreamWriter, record: RequestRecord) -> None:
        self._service, self._tasks, self._writer, self._record = service, tasks, writer, record
        self._chunks = self._generate()
        service._streams.add(self)

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        return await anext(self._chunks)

    async def aclose(self) -> None:
        """Cancel the unfinished work. The record ends as `client_gone` unless it has ended before."""
        await self._chunks.aclose()
        await self._release()

    async def _generate(self) -> AsyncGenerator[bytes, None]:
        try:
            for done in asyncio.as_completed(self._tasks):
                index, rows = await done
                yield self._counted(self._writer.write(index, rows))
            yield self._counted(self._writer.close())
            self._record.complete()
        except TimeoutError:  # the status line is sent already: the client notices the missing end marker
            self._record.abort("deadline")
            log.warning("a response is incomplete: its deadline has passed")
        except Exception as error:
            self._service.dead |= isinstance(error, EngineDead)
            self._record.abort("engine")
            log.exception("a response is incomplete: the engine failed")
        finally:
            await self._release()

    def _counted(self, chunk: bytes) -> bytes:
        self._record.count_bytes(len(chunk))
        return chunk

    async def _release(self) -> None:
        self._record.abort("client_gone")  # ignored if the record has ended
        self._service._streams.discard(self)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
