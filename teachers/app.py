"""The answering side of the wire: a FastAPI application over any Engine. Limits, key, health, problem+json."""

import asyncio
import hashlib
import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from teachers.engine import Engine
from teachers.protocol import (
    ARROW_STREAM,
    PROBLEM,
    TIMEOUT_HEADER,
    Card,
    Problem,
    Ready,
    Rows,
    ScoreRequest,
    StreamWriter,
    TokenizerFile,
)

log = logging.getLogger("tutelage.teacher")
READY_TIMEOUT_S = 20.0
RETRY_AFTER_S = 1


@dataclass(frozen=True)
class Limits:
    """What one request, and all that wait together, may hold."""

    max_sequences: int = 64
    max_request_tokens: int = 1 << 16
    max_queued_tokens: int = 1 << 19
    max_body_bytes: int = 1 << 20
    max_seconds: float = 600.0


class Refusal(Exception):
    """A request that is answered with a problem."""

    def __init__(self, status: int, title: str, detail: str) -> None:
        self.problem = Problem(title=title, status=status, detail=detail)


def build_app(engine: Engine, key: str | None = None, limits: Limits = Limits()) -> FastAPI:
    """The whole contract over one engine. With a key, everything under /v1 asks for it."""
    app = FastAPI(title="Tutelage teacher", docs_url=None, redoc_url=None)
    app.add_exception_handler(Refusal, _refuse)
    app.add_exception_handler(HTTPException, _refuse_http)
    app.add_exception_handler(RequestValidationError, _refuse_validation)
    guarded = [Depends(_key_check(key))] if key else []
    queue = _Queue(engine, limits)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> Ready:
        try:
            await asyncio.wait_for(engine.check(), READY_TIMEOUT_S)
        except Exception as error:  # whatever keeps the engine from answering is the answer
            raise Refusal(503, "Not ready", f"the engine does not answer: {type(error).__name__}") from error
        return Ready()

    @app.get("/v1/teacher", dependencies=guarded)
    async def card() -> Card:
        return engine.card

    @app.get("/v1/teacher/tokenizer", dependencies=guarded)
    async def listing() -> list[TokenizerFile]:
        return [TokenizerFile(name=n, sha256=_sha256(path)) for n, path in engine.tokenizer_files.items()]

    @app.get("/v1/teacher/tokenizer/{name}", dependencies=guarded, response_class=FileResponse)
    async def tokenizer_file(name: str) -> FileResponse:
        if name not in engine.tokenizer_files:
            raise Refusal(404, "No such file", f"expected one of {', '.join(engine.tokenizer_files)}, received {name}")
        return FileResponse(engine.tokenizer_files[name])  # sets ETag

    @app.post("/v1/score", dependencies=guarded, response_class=StreamingResponse, openapi_extra=_SCORE_BODY)
    async def score(request: Request) -> StreamingResponse:
        body = await _body(request, limits.max_body_bytes)
        question = check_request(_parse(body), engine.card, limits)
        return StreamingResponse(queue.answer(question, _timeout_s(request)), media_type=ARROW_STREAM)

    return app


class _Queue:
    """Counts the tokens that wait, refuses more than the limit, and streams answers as they come."""

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self._engine = engine
        self._limit = limits.max_queued_tokens
        self._max_seconds = limits.max_seconds
        self._queued_tokens = 0

    def answer(self, question: ScoreRequest, timeout_s: float | None) -> AsyncIterator[bytes]:
        """Admit the question or raise Refusal; then an iterator of chunks."""
        tokens = sum(map(len, question.sequences))
        if self._queued_tokens + tokens > self._limit:
            raise Refusal(503, "Queue full", f"{self._queued_tokens} of {self._limit} tokens are waiting: ask later")
        return self._chunks(question, min(timeout_s or self._max_seconds, self._max_seconds))

    async def _chunks(self, question: ScoreRequest, timeout_s: float) -> AsyncIterator[bytes]:
        deadline = asyncio.get_running_loop().time() + timeout_s
        tasks = [asyncio.create_task(self._one(question, i)) for i in range(len(question.sequences))]
        writer = StreamWriter(question.top_k, self._engine.card.fingerprint)
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
        self._queued_tokens += len(sequence)
        try:
            return index, await self._engine.score(sequence, question.starts[index], question.top_k)
        finally:
            self._queued_tokens -= len(sequence)


def check_request(question: ScoreRequest, card: Card, limits: Limits) -> ScoreRequest:
    """Refuse what this teacher cannot answer, with one sentence each; returns the question."""
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
    return question


def _parse(body: bytes) -> ScoreRequest:
    try:
        return ScoreRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise Refusal(422, "Malformed", f"{where}: {first['msg']}") from error


async def _body(request: Request, limit_bytes: int) -> bytes:
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > limit_bytes:
            raise Refusal(413, "Too large", f"the body is over {limit_bytes} bytes; send fewer sequences")
    return bytes(data)


def _timeout_s(request: Request) -> float | None:
    value = request.headers.get(TIMEOUT_HEADER)
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e6:
        raise Refusal(422, "Malformed", f"{TIMEOUT_HEADER} must be a positive number of seconds, received {value!r}")
    return seconds


def _key_check(key: str) -> Callable[[Request], Awaitable[None]]:
    expected = key.encode()

    async def check(request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), expected):
            raise Refusal(401, "Unauthorized", "send the teacher's key as 'Authorization: Bearer KEY'")

    return check


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _problem(problem: Problem) -> Response:
    headers = {"www-authenticate": "Bearer"} if problem.status == 401 else {}
    if problem.status == 503:
        headers["retry-after"] = str(RETRY_AFTER_S)
    return Response(problem.model_dump_json(), problem.status, headers, media_type=PROBLEM)


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return _problem(error.problem)


async def _refuse_http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _problem(Problem(title="HTTP error", status=error.status_code, detail=str(error.detail)))


async def _refuse_validation(_: Request, error: Exception) -> Response:
    return _problem(Problem(title="Malformed", status=422, detail=str(error)))


_SCORE_BODY = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": ScoreRequest.model_json_schema()}}}
}
