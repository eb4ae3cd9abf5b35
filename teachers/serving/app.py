"""The answering side of the wire: a Service on FastAPI. Keys, bodies, tokenizer files, health, metrics, problem+json.

`teacher_router` is the whole contract as a router; `build_app` is a server of its own around it.
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from teachers.keys import Keys
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
from teachers.serving.exchange import Exchange
from teachers.serving.service import Chunks, Refusal, Service

Guard = Callable[[Request], Awaitable[None]]
ID_HEADER = "tutelage-request"  # the id under which the request log knows a request


def build_app(service: Service, guard: Guard | None = None) -> FastAPI:
    """A server of its own. The guard stands before everything under /v1."""
    app = FastAPI(title="Tutelage teacher", docs_url=None, redoc_url=None)
    app.add_exception_handler(HTTPException, _refuse_http)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(generate_latest(service.registry), media_type=CONTENT_TYPE_LATEST)

    app.include_router(teacher_router(service, guard))
    return app


def key_guard(keys: Keys) -> Guard:
    """Lets a request pass that carries one of the keys."""

    async def check(request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if not keys.accepts(given.encode()) or scheme.lower() != "bearer":
            raise Refusal(401, "Unauthorized", "send the teacher's key as 'Authorization: Bearer KEY'")

    return check


def teacher_router(service: Service, guard: Guard | None = None) -> APIRouter:
    """/ready and everything under /v1; the guard stands before the latter."""
    router = APIRouter(route_class=_route(service))
    scheme = HTTPBearer(auto_error=False)  # for the OpenAPI document; the guard itself looks
    guarded = [Depends(scheme), Depends(guard)] if guard else []
    refused = (401,) if guard else ()

    @router.get("/ready", responses=_problems(503))
    async def ready() -> Ready:
        await service.check()
        return Ready()

    @router.get("/v1/teacher", dependencies=guarded, responses=_problems(*refused, 503))
    async def card() -> Card:
        return service.engine.card

    @router.get("/v1/teacher/tokenizer", dependencies=guarded, responses=_problems(*refused, 503))
    async def listing() -> list[TokenizerFile]:
        return [TokenizerFile(name=n, sha256=_sha256(path)) for n, path in service.engine.tokenizer_files.items()]

    @router.get(
        "/v1/teacher/tokenizer/{name}",
        dependencies=guarded,
        response_class=FileResponse,
        responses=_problems(*refused, 404, 503),
    )
    async def tokenizer_file(name: str) -> FileResponse:
        files = service.engine.tokenizer_files
        if name not in files:
            raise Refusal(404, "No such file", f"expected one of {', '.join(files)}, received {name}")
        return FileResponse(files[name])  # sets ETag

    @router.post(
        "/v1/score",
        dependencies=guarded,
        response_class=StreamingResponse,
        responses=_ROWS | _problems(*refused, 400, 408, 413, 415, 422, 503),
        openapi_extra=_QUESTION,
    )
    async def score(request: Request) -> StreamingResponse:
        timeout_s = _timeout_s(request)
        question = _parse(await _body(request, service))
        exchange: Exchange = request.state.exchange
        return _Rows(service.answer(question, timeout_s, exchange), exchange, service.limits.max_stall_s)

    return router


def _route(service: Service) -> type[APIRoute]:
    """Routes that answer a Refusal as the problem it is, in whatever application they stand, and see each exchange."""

    class Route(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def handle_or_refuse(request: Request) -> Response:
                peer = f"{request.client.host}:{request.client.port}" if request.client else None
                exchange = service.arrival(peer, f"{request.method} {self.path_format}")
                request.state.exchange = exchange
                try:
                    response = await handle(request)
                except Refusal as refusal:
                    exchange.refused(refusal.problem.status, refusal.reason)
                    response = _problem(refusal.problem, refusal.retry_after_s, refusal.close)
                if not isinstance(response, _Rows):  # it ends with its last byte
                    exchange.answered(response.status_code)
                response.headers[ID_HEADER] = exchange.id
                return response

            return handle_or_refuse

    return Route


class _Rows(StreamingResponse):
    """An answer's chunks. A client that takes nothing for a while loses it, and its work ends."""

    def __init__(self, chunks: Chunks, exchange: Exchange, stall_s: float) -> None:
        super().__init__(chunks, media_type=ARROW_STREAM)
        self._chunks, self._exchange, self._stall_s = chunks, exchange, stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_soon(message: Any) -> None:
            async with asyncio.timeout(self._stall_s):
                await send(message)

        try:
            await super().__call__(scope, receive, send_soon)
        except TimeoutError:
            self._exchange.aborted("stalled")
        finally:
            await self._chunks.aclose()
            self._exchange.aborted("client_gone")  # heard only if it left before the first chunk


def _parse(body: bytes) -> ScoreRequest:
    try:
        return ScoreRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise Refusal(422, "Malformed", f"{where}: {first['msg']}") from error


async def _body(request: Request, service: Service) -> bytes:
    """The whole body, within limits of type, size, time, and number at once."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, "Not JSON", "send the question as application/json", close=True)
    limits = service.limits
    data = bytearray()
    with service.reading():
        try:
            async with asyncio.timeout(limits.max_body_s):
                async for chunk in request.stream():
                    data += chunk
                    if len(data) > limits.max_body_bytes:
                        detail = f"the body is over {limits.max_body_bytes} bytes; send fewer sequences"
                        raise Refusal(413, "Too large", detail, close=True)
        except TimeoutError as error:
            detail = f"the body did not arrive within {limits.max_body_s:g} s"
            raise Refusal(408, "Too slow", detail, close=True) from error
        except ClientDisconnect as error:
            raise Refusal(400, "Incomplete", "the connection ended before the body", close=True) from error
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


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _problem(problem: Problem, retry_after_s: int | None = None, close: bool = False) -> Response:
    headers = {"www-authenticate": "Bearer"} if problem.status == 401 else {}
    if retry_after_s is not None:
        headers["retry-after"] = str(retry_after_s)
    if close:
        headers["connection"] = "close"
    return Response(problem.model_dump_json(), problem.status, headers, media_type=PROBLEM)


async def _refuse_http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = _problem(Problem(title="HTTP error", status=error.status_code, detail=str(error.detail)))
    response.headers.update(error.headers or {})
    return response


# --- the OpenAPI document ---


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    content = {PROBLEM: {"schema": Problem.model_json_schema()}}
    return {status: {"description": "A problem (RFC 9457).", "content": content} for status in statuses}


_ROWS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "An Arrow stream, one record batch per sequence. Without its end mark it is cut short.",
        "content": {ARROW_STREAM: {"schema": {"type": "string", "format": "binary"}}},
    }
}
_QUESTION = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": ScoreRequest.model_json_schema()}}},
    "parameters": [
        {
            "name": TIMEOUT_HEADER,
            "in": "header",
            "description": "Seconds after which nobody waits for the answer any more.",
            "schema": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1e6},
        }
    ],
}
