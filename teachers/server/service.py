"""Service of one engine: admission of requests, fair shares, deadlines, and limits of unsent rows.

This module contains no HTTP: app.py serves it with FastAPI, vllm_plugin.py in a vLLM server, ray_serve.py in Ray.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from weakref import WeakSet, ref

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
from teachers.server.score_stream import ScoreStream, Task
from teachers.server.shares import FairShares
from teachers.server.static_responses import StaticResponses

CHECK_TIMEOUT_S = 20.0
PROGRESS_S = 15.0  # an engine that started or finished a sequence within this time works, however long its queue is


class Service:
    """Score requests with one engine, within limits and fair shares, and stream the rows of each finished sequence.

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
        self._queue, self._bodies = FairShares(limits.max_queued_tokens), FairShares(limits.max_bodies)
        self._streams: WeakSet[ScoreStream] = WeakSet()
        self._drained_at: float | None = None
        self._checking: asyncio.Task[None] | None = None
        self.dead = False  # the engine needs a new process
        self._engine: Engine | None = None
        self._static_responses: StaticResponses | None = None
        if engine is not None:
            self.engine = engine

    @property
    def engine(self) -> Engine:
        """The engine. Raises Rejection while there is none."""
        if self._engine is None:
            raise _starting()
        return self._engine

    @engine.setter
    def engine(self, engine: Engine) -> None:
        self._engine, self._static_responses = engine, StaticResponses(engine)
        self.metrics.info.labels(engine.card.model, engine.card.fingerprint, engine.card.engine).set(1)

    @property
    def static_responses(self) -> StaticResponses:
        """Card and tokenizer files as responses. Raises Rejection while there is no engine."""
        if self._static_responses is None:
            raise _starting()
        return self._static_responses

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
    def receiving_body(self, client: str) -> Iterator[None]:
        """Count one request body that is being received. Raises Rejection if there are too many."""
        self.require_open()
        if self._bodies.excess(client, 1):
            detail = f"{self._bodies.taken} requests are being received: retry later"
            raise Rejection(503, "Too many at once", detail, 1, close=True)
        self._bodies.take(client, 1)
        try:
            yield
        finally:
            self._bodies.release(client, 1)

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
    ) -> ScoreStream:
        """Admit a request, start the work and return the stream of its response. Raises Rejection.

        Close the stream, whether or not it was read: closing cancels the unfinished work.
        """
        record = record or self.new_record(None, "score")
        record.describe(request)
        try:
            self._admit(request, record.client)
        except Rejection as rejection:
            record.reject(rejection.problem.status, rejection.reason)
            raise
        record.admit()
        max_s = self.limits.max_seconds
        deadline = asyncio.get_running_loop().time() + min(timeout_s or max_s, max_s)
        writer = StreamWriter(request, self.engine.card.fingerprint)
        stream = ScoreStream(writer, record, self._on_end)
        self._streams.add(stream)
        for index in range(len(request.sequences)):
            stream.tasks[index] = self._start(request, index, deadline, stream)
        return stream

    def _admit(self, request: ScoreRequest, client: str) -> None:
        self.require_open()
        check_request(request, self.engine.card, self.limits)
        queue, tokens = self._queue, sum(map(len, request.sequences))
        if excess := queue.excess(client, tokens):
            of_all = f"{queue.taken} of {self.limits.max_queued_tokens} tokens are queued"
            of_client = f"{queue.taken_by(client)} tokens of this client are queued while others wait"
            is_full = queue.taken + tokens > self.limits.max_queued_tokens
            detail = f"{of_all if is_full else of_client}: retry later"
            raise Rejection(503, "Queue full", detail, self._backlog.wait_s(excess))

    def _start(self, request: ScoreRequest, index: int, deadline: float, stream: ScoreStream) -> Task:
        """Start to score one sequence. Its tokens count as queued until the task ends, even if it never runs."""
        tokens = len(request.sequences[index])
        self._backlog.enter(tokens)
        self._queue.take(stream.client, tokens)
        self.metrics.queued_tokens.inc(tokens)
        task = asyncio.create_task(self._score_sequence(request, index, deadline))
        task.add_done_callback(partial(self._finish, tokens, stream.client, ref(stream)))
        return task

    def _finish(self, tokens: int, client: str, stream: "ref[ScoreStream]", task: Task) -> None:
        finished = not task.cancelled() and task.exception() is None
        self._backlog.leave(tokens, finished)
        self._queue.release(client, tokens)
        self.metrics.queued_tokens.dec(tokens)
        if finished and (reader := stream()) is not None:
            reader.hold(task.result()[1])
            self._limit_held_rows()

    def _limit_held_rows(self) -> None:
        """Abort responses until the unsent rows of all streams fit into `max_held_bytes`.

        The largest response of the client with the most unsent rows is aborted first.
        """
        while True:
            held: Counter[str] = Counter()
            for stream in self._streams:
                held[stream.client] += stream.held_bytes
            if held.total() <= self.limits.max_held_bytes:
                return
            client = max(held, key=held.__getitem__)
            of_client = [stream for stream in self._streams if stream.client == client]
            max(of_client, key=lambda stream: stream.held_bytes).abort("not_taken")

    def _on_end(self, stream: ScoreStream, error: Exception | None) -> None:
        self.dead |= isinstance(error, EngineDead)
        self._streams.discard(stream)

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


def _starting() -> Rejection:
    return Rejection(503, "Starting", "the engine is still starting: retry later", retry_after_s=5)
