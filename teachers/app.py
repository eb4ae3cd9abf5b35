"""The answering side of the wire: a Service on FastAPI. Keys, bodies, tokenizer files, health, problem+json.

`teacher_router` is the whole contract as a router; `build_app` is a server of its own around it.
"""

import hashlib
import hmac
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
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
    ScoreRequest,
    TokenizerFile,
)
from teachers.service import Limits, Refusal, Service

Guard = Callable[[Request], Awaitable[None]]


def build_app(engine: Engine, key: str | None = None, limits: Limits = Limits()) -> FastAPI:
    """A server of its own over one engine. With a key, everything under /v1 asks for it."""
    app = FastAPI(title="Tutelage teacher", docs_url=None, redoc_url=None)
    app.add_exception_handler(HTTPException, _refuse_http)
    app.add_exception_handler(RequestValidationError, _refuse_validation)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    app.include_router(teacher_router(Service(engine, limits), _key_check(key) if key else None))
    return app


class _Route(APIRoute):
    """Answers a Refusal as the problem it is, in whatever application the route stands."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_or_refuse(request: Request) -> Response:
            try:
                return await handle(request)
            except Refusal as refusal:
                return _problem(refusal.problem, refusal.retry_after_s)

        return handle_or_refuse


def teacher_router(service: Service, guard: Guard | None = None) -> APIRouter:
    """/ready and everything under /v1; the guard stands before the latter."""
    router = APIRouter(route_class=_Route)
    guarded = [Depends(guard)] if guard else []

    @router.get("/ready")
    async def ready() -> Ready:
        await service.check()
        return Ready()

    @router.get("/v1/teacher", dependencies=guarded)
    async def card() -> Card:
        return service.engine.card

    @router.get("/v1/teacher/tokenizer", dependencies=guarded)
    async def listing() -> list[TokenizerFile]:
        return [TokenizerFile(name=n, sha256=_sha256(path)) for n, path in service.engine.tokenizer_files.items()]

    @router.get("/v1/teacher/tokenizer/{name}", dependencies=guarded, response_class=FileResponse)
    async def tokenizer_file(name: str) -> FileResponse:
        files = service.engine.tokenizer_files
        if name not in files:
            raise Refusal(404, "No such file", f"expected one of {', '.join(files)}, received {name}")
        return FileResponse(files[name])  # sets ETag

    @router.post("/v1/score", dependencies=guarded, response_class=StreamingResponse, openapi_extra=_SCORE_BODY)
    async def score(request: Request) -> StreamingResponse:
        question = _parse(await _body(request, service.limits.max_body_bytes))
        return StreamingResponse(service.answer(question, _timeout_s(request)), media_type=ARROW_STREAM)

    return router


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


def _key_check(key: str) -> Guard:
    expected = key.encode()

    async def check(request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), expected):
            raise Refusal(401, "Unauthorized", "send the teacher's key as 'Authorization: Bearer KEY'")

    return check


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _problem(problem: Problem, retry_after_s: int | None = None) -> Response:
    headers = {"www-authenticate": "Bearer"} if problem.status == 401 else {}
    if retry_after_s is not None:
        headers["retry-after"] = str(retry_after_s)
    return Response(problem.model_dump_json(), problem.status, headers, media_type=PROBLEM)


async def _refuse_http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _problem(Problem(title="HTTP error", status=error.status_code, detail=str(error.detail)))


async def _refuse_validation(_: Request, error: Exception) -> Response:
    return _problem(Problem(title="Malformed", status=422, detail=str(error)))


_SCORE_BODY = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": ScoreRequest.model_json_schema()}}}
}
