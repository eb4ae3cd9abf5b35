"""HTTP routes of a Service, with FastAPI: keys, request bodies, tokenizer files, health, metrics, problem+json.

`teacher_router` contains the routes of the protocol; `build_app` is a complete server around them.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
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
from teachers.model_dirs import file_sha256
from teachers.protocol.messages import (
    ARROW_STREAM,
    PROBLEM,
    TIMEOUT_HEADER,
    Problem,
    Ready,
    ScoreRequest,
    TeacherCard,
    TokenizerFile,
)
from teachers.server.admission import Rejection
from teachers.server.request_log import RequestRecord
from teachers.server.service import ScoreStream, Service

Guard = Callable[[Request], Awaitable[None]]
ID_HEADER = "tutelage-request"  # id of a request in the request log


def build_app(service: Service, guard: Guard | None = None) -> FastAPI:
    """Return a complete application. `guard` authorizes every request under /v1."""
    app = FastAPI(title="Tutelage teacher", docs_url=None, redoc_url=None)
    app.add_exception_handler(HTTPException, _http_problem)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(generate_latest(service.registry), media_type=CONTENT_TYPE_LATEST)

    app.include_router(teacher_router(service, guard))
    return app


def key_guard(keys: Keys) -> Guard:
    """Return a guard that raises Rejection (401) unless the request has one of the keys."""

    async def check(request: Request) -> None:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if not keys.accepts(key.encode()) or scheme.lower() != "bearer":
            raise Rejection(401, "Unauthorized", "send the teacher's key as 'Authorization: Bearer KEY'")

    return check


def teacher_router(service: Service, guard: Guard | None = None) -> APIRouter:
    """Return the routes /ready and /v1/…. `guard` authorizes every request under /v1."""
    router = APIRouter(route_class=_route(service))
    scheme = HTTPBearer(auto_error=False)  # for the OpenAPI document only: the guard checks the key
    guarded = [Depends(scheme), Depends(guard)] if guard else []
    unauthorized = (401,) if guard else ()

    @router.get("/ready", responses=_problems(503))
    async def ready() -> Ready:
        await service.check()
        return Ready()

    @router.get("/v1/teacher", dependencies=guarded, responses=_problems(*unauthorized, 503))
    async def card() -> TeacherCard:
        return service.engine.card

    @router.get("/v1/teacher/tokenizer", dependencies=guarded, responses=_problems(*unauthorized, 503))
    async def listing() -> list[TokenizerFile]:
        return [TokenizerFile(name=n, sha256=file_sha256(path)) for n, path in service.engine.tokenizer_files.items()]

    @router.get(
        "/v1/teacher/tokenizer/{name}",
        dependencies=guarded,
        response_class=FileResponse,
        responses=_problems(*unauthorized, 404, 503),
    )
    async def tokenizer_file(name: str) -> FileResponse:
        files = service.engine.tokenizer_files
        if name not in files:
            raise Rejection(404, "No such file", f"expected one of {', '.join(files)}, received {name}")
        return FileResponse(files[name])  # sets ETag

    @router.post(
        "/v1/score",
        dependencies=guarded,
        response_class=StreamingResponse,
        responses=_ROWS_RESPONSE | _problems(*unauthorized, 400, 408, 413, 415, 422, 503),
        openapi_extra=_REQUEST,
    )
    async def score(request: Request) -> StreamingResponse:
        timeout_s = _timeout_s(request)
        score_request = _parse(await _receive_body(request, service))
        record: RequestRecord = request.state.record
        return _ScoreResponse(service.score(score_request, timeout_s, record), record, service.limits.max_stall_s)

    return router


def _route(service: Service) -> type[APIRoute]:
    """Return a route class that records every request and converts a Rejection to a problem, in any application."""

    class Route(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def handle_request(request: Request) -> Response:
                peer = f"{request.client.host}:{request.client.port}" if request.client else None
                record = service.new_record(peer, f"{request.method} {self.path_format}")
                request.state.record = record
                try:
                    response = await handle(request)
                except Rejection as rejection:
                    record.reject(rejection.problem.status, rejection.reason)
                    response = _problem(rejection.problem, rejection.retry_after_s, rejection.close)
                if not isinstance(response, _ScoreResponse):  # its record ends with the last byte
                    record.complete(response.status_code)
                response.headers[ID_HEADER] = record.id
                return response

            return handle_request

    return Route


class _ScoreResponse(StreamingResponse):
    """The chunks of a score response. It is aborted if the client receives nothing for `stall_s` seconds."""

    def __init__(self, stream: ScoreStream, record: RequestRecord, stall_s: float) -> None:
        super().__init__(stream, media_type=ARROW_STREAM)
        self._stream, self._record, self._stall_s = stream, record, stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_timeout(message: Any) -> None:
            async with asyncio.timeout(self._stall_s):
                await send(message)

        try:
            await super().__call__(scope, receive, send_with_timeout)
        except TimeoutError:
            self._record.abort("stalled")
        finally:
            await self._stream.aclose()  # also if the client disconnected before the first chunk was read


def _parse(body: bytes) -> ScoreRequest:
    try:
        return ScoreRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "body"
        raise Rejection(422, "Malformed", f"{field}: {first['msg']}") from error


async def _receive_body(request: Request, service: Service) -> bytes:
    """Return the body. Raises Rejection for a wrong media type and beyond the limits of size, time and concurrency."""
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise Rejection(415, "Not JSON", "send the request as application/json", close=True)
    limits = service.limits
    data = bytearray()
    with service.receiving_body():
        try:
            async with asyncio.timeout(limits.max_body_s):
                async for chunk in request.stream():
                    data += chunk
                    if len(data) > limits.max_body_bytes:
                        detail = f"the body has over {limits.max_body_bytes} bytes; send fewer sequences"
                        raise Rejection(413, "Too large", detail, close=True)
        except TimeoutError as error:
            detail = f"the body did not arrive within {limits.max_body_s:g} s"
            raise Rejection(408, "Too slow", detail, close=True) from error
        except ClientDisconnect as error:
            raise Rejection(400, "Incomplete", "the connection ended before the end of the body", close=True) from error
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
        raise Rejection(422, "Malformed", f"{TIMEOUT_HEADER} must be a positive number of seconds, received {value!r}")
    return seconds


def _problem(problem: Problem, retry_after_s: int | None = None, close: bool = False) -> Response:
    headers = {"www-authenticate": "Bearer"} if problem.status == 401 else {}
    if retry_after_s is not None:
        headers["retry-after"] = str(retry_after_s)
    if close:
        headers["connection"] = "close"
    return Response(problem.model_dump_json(), problem.status, headers, media_type=PROBLEM)


async def _http_problem(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = _problem(Problem(title="HTTP error", status=error.status_code, detail=str(error.detail)))
    response.headers.update(error.headers or {})
    return response


# --- the OpenAPI document ---


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    content = {PROBLEM: {"schema": Problem.model_json_schema()}}
    return {status: {"description": "A problem (RFC 9457).", "content": content} for status in statuses}


_ROWS_RESPONSE: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "An Arrow stream, one record batch per sequence. Without its end marker it is incomplete.",
        "content": {ARROW_STREAM: {"schema": {"type": "string", "format": "binary"}}},
    }
}
_REQUEST = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": ScoreRequest.model_json_schema()}}},
    "parameters": [
        {
            "name": TIMEOUT_HEADER,
            "in": "header",
            "description": "Seconds after which the client stops waiting for the response.",
            "schema": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1e6},
        }
    ],
}
