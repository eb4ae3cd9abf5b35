"""One engine behind limits: what a teacher admits, how long it works on it, and what it refuses.

No HTTP here: app.py puts it on FastAPI, plugin.py into a vLLM server, serve.py into Ray.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from teachers.engine import Engine
from teachers.protocol import Card, Problem, ScoreRequest
from teachers.rows import Rows, StreamWriter

log = logging.getLogger("tutelage.teacher")
CHECK_TIMEOUT_S = 20.0
PROGRESS_S = 15.0  # an engine that began or answered something within this time is alive, however much waits


@dataclass(frozen=True)
class Limits:
    """What one request, and all that wait together, may hold."""

    max_sequences: int = 64
    max_request_tokens: int = 1 << 16
    max_queued_tokens: int = 1 << 19
    max_body_bytes: int = 1 << 20
    max_seconds: float = 600.0


class Refusal(Exception):
    """A question that is answered with a problem."""

    def __init__(self, status: int, title: str, detail: str, retry_after_s: int | None = None) -> None:
        super().__init__(detail)
        self.problem = Problem(title=title, status=status, detail=detail)
        self.retry_after_s = retry_after_s


class Service:
    """Admits questions, counts the tokens that wait, and streams answers as they come.

    `engine` may be set later than the service is made: until then everything is refused with 503.
    """

    def __init__(self, engine: Engine | None = None, limits: Limits = Limits()) -> None:
        self._engine = engine
        self.limits = limits
        self._queued_tokens = 0
        self._progress_at = 0.0

    @property
    def engine(self) -> Engine:
        """Raises Refusal while there is none."""
        if self._engine is None:
            raise Refusal(503, "Starting", "the engine is still starting: ask later", retry_after_s=5)
        return self._engine

    @engine.setter
    def engine(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def queued_tokens(self) -> int:
        """Tokens of all sequences that are not answered yet."""
        return self._queued_tokens

    async def check(self) -> None:
        """A busy engine shows that it lives by what it answers; an idle one is asked. Raises Refusal."""
        engine = self.engine
        if self._queued_tokens and time.monotonic() - self._progress_at < PROGRESS_S:
            return
        try:
            await asyncio.wait_for(engine.check(), CHECK_TIMEOUT_S)
        except Exception as error:  # whatever keeps the engine from answering is the answer
            raise Refusal(503, "Not ready", f"the engine does not answer: {type(error).__name__}") from error

    def answer(self, question: ScoreRequest, timeout_s: float | None = None) -> AsyncIterator[bytes]:
        """Admit the question or raise Refusal; then the chunks of one Arrow stream. One cut short has no end mark."""
        check_question(question, self.engine.card, self.limits)
        tokens = sum(map(len, question.sequences))
        limit = self.limits.max_queued_tokens
        if self._queued_tokens + tokens > limit:
            detail = f"{self._queued_tokens} of {limit} tokens are waiting: ask later"
            raise Refusal(503, "Queue full", detail, retry_after_s=1)
        most = self.limits.max_seconds
        return self._chunks(question, min(timeout_s or most, most))

    async def _chunks(self, question: ScoreRequest, timeout_s: float) -> AsyncIterator[bytes]:
        deadline = asyncio.get_running_loop().time() + timeout_s
        tasks = [asyncio.create_task(self._one(question, i)) for i in range(len(question.sequences))]
        writer = StreamWriter(question.top_k, self.engine.card.fingerprint)
        try:
            for done in asyncio.as_completed(tasks):
                async with asyncio.timeout_at(deadline):  # not around the yield: a client may never read
                    index, rows = await done
                yield writer.write(index, rows)
            yield writer.close()
        except Exception:  # the status line is out: an answer cut short is how the client learns of it
            log.exception("an answer was cut short")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(self, question: ScoreRequest, index: int) -> tuple[int, Rows]:
        sequence = question.sequences[index]
        if not self._queued_tokens:
            self._progress_at = time.monotonic()
        self._queued_tokens += len(sequence)
        try:
            rows = await self.engine.score(sequence, question.starts[index], question.top_k)
            self._progress_at = time.monotonic()
            return index, rows
        finally:
            self._queued_tokens -= len(sequence)


def check_question(question: ScoreRequest, card: Card, limits: Limits) -> None:
    """Refuse what this teacher cannot answer, with one sentence each."""
    sequences, starts = question.sequences, question.starts
    if len(sequences) != len(starts) or not sequences:
        raise Refusal(422, "Malformed", f"expected one start per sequence, received {len(starts)} for {len(sequences)}")
    if len(sequences) > limits.max_sequences:
        raise Refusal(413, "Too large", f"{len(sequences)} sequences; send at most {limits.max_sequences}")
    if sum(map(len, sequences)) > limits.max_request_tokens:
        raise Refusal(413, "Too large", f"{sum(map(len, sequences))} tokens; send at most {limits.max_request_tokens}")
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
