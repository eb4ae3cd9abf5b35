"""One engine behind limits: what a teacher admits, how long it works on it, and what it refuses.

No HTTP here: app.py puts it on FastAPI, plugin.py into a vLLM server, ray_serve.py into Ray.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from functools import partial

from prometheus_client import CollectorRegistry

from teachers.backlog import Backlog, bounded_s
from teachers.engine import ChoosingEngine, Engine
from teachers.errors import EngineDead, TeacherError
from teachers.limits import Limits
from teachers.protocol import Card, Problem, ScoreRequest
from teachers.rows import Rows, StreamWriter
from teachers.serving.exchange import Exchange
from teachers.serving.meters import meters_in, own_registry

log = logging.getLogger("tutelage.teacher")
CHECK_TIMEOUT_S = 20.0
PROGRESS_S = 15.0  # an engine that began or answered something within this time is alive, however much waits
Task = asyncio.Task[tuple[int, Rows]]
Chunks = AsyncGenerator[bytes, None]


class Refusal(Exception):
    """A question that is answered with a problem. With `close`, the connection ends with it."""

    def __init__(
        self, status: int, title: str, detail: str, retry_after_s: int | None = None, *, close: bool = False
    ) -> None:
        super().__init__(detail)
        self.problem = Problem(title=title, status=status, detail=detail)
        self.retry_after_s = retry_after_s
        self.close = close

    @property
    def reason(self) -> str:
        """The title as a word for meters and logs."""
        return self.problem.title.lower().replace(" ", "_")


class Service:
    """Admits questions, counts the tokens that wait, and streams answers as they come.

    `engine` may be set later than the service is made: until then everything is refused with 503.
    Its meters stand in `registry`, by default one of its own.
    """

    def __init__(
        self, engine: Engine | None = None, limits: Limits = Limits(), registry: CollectorRegistry | None = None
    ) -> None:
        self.limits = limits
        self.registry = own_registry() if registry is None else registry
        self.meters = meters_in(self.registry)
        self._backlog = Backlog()
        self._bodies = self._streams = 0
        self._drained_at: float | None = None
        self._checking: asyncio.Task[None] | None = None
        self.dead = False  # for good: only a new process can answer again
        self._engine: Engine | None = None
        if engine is not None:
            self.engine = engine

    @property
    def engine(self) -> Engine:
        """Raises Refusal while there is none."""
        if self._engine is None:
            raise Refusal(503, "Starting", "the engine is still starting: ask later", retry_after_s=5)
        return self._engine

    @engine.setter
    def engine(self, engine: Engine) -> None:
        self._engine = engine
        self.meters.info.labels(engine.card.model, engine.card.fingerprint, engine.card.engine).set(1)

    @property
    def queued_tokens(self) -> int:
        """Tokens of all sequences that are not answered yet."""
        return self._backlog.tokens

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return not self._backlog.tokens and not self._streams

    @property
    def draining(self) -> bool:
        return self._drained_at is not None

    def drain(self, seconds: float) -> None:
        """From now on every new question is refused; what is under way has this long."""
        self._drained_at = time.monotonic() + seconds

    def require_open(self) -> None:
        """Raises Refusal while the service drains."""
        if self._drained_at is not None:
            wait_s = bounded_s(self._drained_at - time.monotonic())
            raise Refusal(503, "Draining", "this server is about to end: ask another, or later", wait_s, close=True)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around the reading of one request's body. Raises Refusal while too many are being read."""
        self.require_open()
        if self._bodies >= self.limits.max_bodies:
            raise Refusal(503, "Too many at once", f"{self._bodies} requests are being read: ask later", 1, close=True)
        self._bodies += 1
        try:
            yield
        finally:
            self._bodies -= 1

    def arrival(self, peer: str | None, what: str) -> Exchange:
        """A request has arrived; whoever answers it says how it ended."""
        return Exchange(self.meters, peer, what)

    async def check(self) -> None:
        """A busy engine shows that it lives by what it answers; an idle one is asked, once for all who want to know.

        Raises Refusal.
        """
        self.require_open()
        engine = self.engine
        if self._backlog.tokens and time.monotonic() - self._backlog.progress_at < PROGRESS_S:
            return
        if self._checking is None or self._checking.done():
            self._checking = asyncio.create_task(asyncio.wait_for(engine.check(), CHECK_TIMEOUT_S))
        try:
            await asyncio.shield(self._checking)
        except Exception as error:  # whatever keeps the engine from answering is the answer
            self.dead |= isinstance(error, EngineDead)
            self.meters.engine_ready.set(0)
            raise Refusal(503, "Not ready", f"the engine does not answer: {type(error).__name__}") from error
        self.meters.engine_ready.set(1)

    def answer(
        self, question: ScoreRequest, timeout_s: float | None = None, exchange: Exchange | None = None
    ) -> Chunks:
        """Admit the question or raise Refusal; then the chunks of one Arrow stream. One cut short has no end mark.

        Without an exchange, the service itself says how the question ended.
        """
        exchange = exchange or self.arrival(None, "answer")
        exchange.asks(question)
        try:
            self._admit(question)
        except Refusal as refusal:
            exchange.refused(refusal.problem.status, refusal.reason)
            raise
        exchange.admitted()
        most = self.limits.max_seconds
        deadline = asyncio.get_running_loop().time() + min(timeout_s or most, most)
        tasks = [self._start(question, i, deadline) for i in range(len(question.sequences))]
        return self._chunks(question, tasks, exchange)

    def _admit(self, question: ScoreRequest) -> None:
        self.require_open()
        check_question(question, self.engine.card, self.limits)
        waiting, limit = self._backlog.tokens, self.limits.max_queued_tokens
        over = waiting + sum(map(len, question.sequences)) - limit
        if over > 0:
            detail = f"{waiting} of {limit} tokens are waiting: ask later"
            raise Refusal(503, "Queue full", detail, self._backlog.wait_s(over))

    def _start(self, question: ScoreRequest, index: int, deadline: float) -> Task:
        """The tokens are counted from here until the task is over, even if it never runs."""
        tokens = len(question.sequences[index])
        self._backlog.enter(tokens)
        self.meters.queued_tokens.inc(tokens)
        task = asyncio.create_task(self._one(question, index, deadline))
        task.add_done_callback(partial(self._finish, tokens))
        return task

    def _finish(self, tokens: int, task: Task) -> None:
        self._backlog.leave(tokens, answered=not task.cancelled() and task.exception() is None)
        self.meters.queued_tokens.dec(tokens)

    async def _one(self, question: ScoreRequest, index: int, deadline: float) -> tuple[int, Rows]:
        began = time.monotonic()
        async with asyncio.timeout_at(deadline):
            asked = (question.sequences[index], question.starts[index], question.top_k)
            if not question.chosen:
                rows = await self.engine.score(*asked)
            elif isinstance(self.engine, ChoosingEngine):
                rows = await self.engine.score_chosen(*asked, question.chosen[index])
            else:
                raise TeacherError(f"{self.engine.card.engine}: its card has max_chosen, and it scores no chosen ids")
        self.meters.engine_seconds.observe(time.monotonic() - began)
        self.meters.engine_ready.set(1)
        self.meters.sequences_scored.inc()
        self.meters.tokens_scored.inc(len(rows))
        return index, rows

    async def _chunks(self, question: ScoreRequest, tasks: list[Task], exchange: Exchange) -> Chunks:
        self._streams += 1
        writer = StreamWriter(question.top_k, self.engine.card.fingerprint, question.num_chosen)
        try:
            for done in asyncio.as_completed(tasks):
                index, rows = await done
                chunk = writer.write(index, rows)
                exchange.sends(len(chunk))
                yield chunk
            end = writer.close()
            exchange.sends(len(end))
            yield end
            exchange.answered()
        except TimeoutError:  # the status line is out: an answer cut short is how the client learns of it
            exchange.aborted("deadline")
            log.warning("an answer was cut short by its deadline")
        except Exception as error:
            self.dead |= isinstance(error, EngineDead)
            exchange.aborted("engine")
            log.exception("an answer was cut short")
        finally:
            exchange.aborted("client_gone")
            self._streams -= 1
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def check_question(question: ScoreRequest, card: Card, limits: Limits) -> None:
    """Refuse what this teacher cannot answer, with one sentence each."""
    sequences, starts = question.sequences, question.starts
    if len(sequences) != len(starts) or not sequences:
        raise Refusal(422, "Malformed", f"expected one start per sequence, received {len(starts)} for {len(sequences)}")
    if len(sequences) > limits.max_sequences:
        raise Refusal(413, "Too large", f"{len(sequences)} sequences; send at most {limits.max_sequences}")
    tokens, most = sum(map(len, sequences)), min(limits.max_request_tokens, limits.max_queued_tokens)
    if tokens > most:
        raise Refusal(413, "Too large", f"{tokens} tokens; send at most {most}")
    if question.top_k > card.max_top_k:
        raise Refusal(422, "K too large", f"top_k is {question.top_k}; this teacher answers at most {card.max_top_k}")
    for i, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
        if len(sequence) > card.max_tokens:
            detail = f"sequence {i} has {len(sequence)} tokens; this teacher takes at most {card.max_tokens}"
            raise Refusal(422, "Sequence too long", detail)
        if not 1 <= start < len(sequence):
            detail = f"sequence {i}: start {start} leaves no position of {len(sequence)} tokens to answer"
            raise Refusal(422, "Nothing to score", detail)
        if max(sequence) >= card.vocab_size:
            detail = f"sequence {i} holds id {max(sequence)}; the vocabulary ends at {card.vocab_size - 1}"
            raise Refusal(422, "Token id out of range", detail)
    if question.chosen:
        _check_chosen(question, card)


def _check_chosen(question: ScoreRequest, card: Card) -> None:
    """How many there are in all is bounded by the body that holds them."""
    if not card.max_chosen:
        detail = f"{card.engine} scores no chosen ids: leave chosen out"
        raise Refusal(422, "No chosen ids", detail)
    expected = [len(s) - start for s, start in zip(question.sequences, question.starts, strict=True)]
    received = [len(positions) for positions in question.chosen]
    if received != expected:
        detail = f"chosen: expected ids for {expected} positions, as many as are scored, received {received}"
        raise Refusal(422, "Malformed", detail)
    counts = {len(ids) for positions in question.chosen for ids in positions}
    if len(counts) > 1 or not 1 <= max(counts) <= card.max_chosen:
        detail = f"chosen: expected the same number of ids at every position, from 1 to {card.max_chosen}, received "
        raise Refusal(422, "Malformed", detail + ", ".join(map(str, sorted(counts))))
    largest = max(max(ids) for positions in question.chosen for ids in positions)
    if largest >= card.vocab_size:
        detail = f"chosen holds id {largest}; the vocabulary ends at {card.vocab_size - 1}"
        raise Refusal(422, "Token id out of range", detail)
