"""HTTP routes of a Service, with FastAPI: scores, card, tokenizer files, health, metrics, problem+json.

`teacher_router` contains the routes of the protocol; `build_app` is a complete server around them.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import PlainTextResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from teachers.protocol.messages import (
    ARROW_STREAM,
    TIMEOUT_HEADER,
    Ready,
    ScoreRequest,
    TeacherCard,
    TokenizerFile,
)
from teachers.server.admission import Rejection
from teachers.server.bodies import receive_request
from teachers.server.guards import Guard, LoopbackGuard
from teachers.server.problems import documented, problem_response
from teachers.server.request_log import RequestRecord
from teachers.server.score_stream import ScoreStream
from teachers.server.service import Service

ID_HEADER = "tutelage-request"  # id of a request in the request log


def build_app(service: Service, guard: Guard | None = None) -> FastAPI:
    """Return a complete application. `guard` authorizes requests under /v1; without a guard, LoopbackGuard is used."""
    app = FastAPI(title="Tutelage teacher", docs_url=None, redoc_url=None, redirect_slashes=False)
    if guard is None:
        app.add_middleware(LoopbackGuard, service=service)
    app.add_exception_handler(HTTPException, _http_problem)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(generate_latest(service.registry), media_type=CONTENT_TYPE_LATEST)

    app.include_router(teacher_router(service, guard))
    return app


def teacher_router(service: Service, guard: Guard | None = None) -> APIRouter:
    """Return the routes /ready and /v1/…. `guard` authorizes every request under /v1."""
    router = APIRouter(route_class=_route(service))
    scheme = HTTPBearer(auto_error=False)  # for the OpenAPI document only: the guard checks the key
    guarded = [Depends(scheme), Depends(guard)] if guard else []
    refused = (401,) if guard else (403, 421)

    @router.get("/ready", responses=documented(503))
    async def ready() -> Ready:
        await service.check()
        return Ready()

    @router.get("/v1/teacher", dependencies=guarded, responses=documented(*refused, 503), response_model=TeacherCard)
    async def card() -> Response:
        return service.static_responses.card()

    @router.get(
        "/v1/teacher/tokenizer",
        dependencies=guarded,
        response_model=list[TokenizerFile],
        responses=documented(*refused, 503),
    )
    async def listing() -> Response:
        return service.static_responses.listing()

    @router.get(
        "/v1/teacher/tokenizer/{name}",
        dependencies=guarded,
        response_class=StreamingResponse,
        responses=documented(*refused, 404, 503),
    )
    async def tokenizer_file(name: str) -> Response:
        return service.static_responses.tokenizer_file(name)

    @router.post(
        "/v1/score",
        dependencies=guarded,
        response_class=StreamingResponse,
        responses=_ROWS_RESPONSE | documented(*refused, 400, 408, 413, 415, 422, 503),
        openapi_extra=_REQUEST,
    )
    async def score(request: Request) -> StreamingResponse:
        record: RequestRecord = request.state.record
        score_request = await receive_request(request, service, record.client)
        timeout_s = _timeout_s(request)
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
                    response = problem_response(rejection)
                if not isinstance(response, _ScoreResponse):  # its record ends with the last byte
                    record.complete(response.status_code)
                response.headers[ID_HEADER] = record.id
                return response

            return handle_request

    return Route


class _ScoreResponse(StreamingResponse):
    """Streaming response of a score request.

    It is aborted if the client receives nothing for `stall_s` seconds, or if the service aborts its stream.
    """

    def __init__(self, stream: ScoreStream, record: RequestRecord, stall_s: float) -> None:
        super().__init__(stream, media_type=ARROW_STREAM)
        self._stream, self._record, self._stall_s = stream, record, stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_timeout(message: Any) -> None:
            async with asyncio.timeout(self._stall_s):
                await send(message)

        try:
            async with asyncio.timeout(None) as interrupt:
                self._stream.on_abort = lambda: interrupt.reschedule(asyncio.get_running_loop().time())
                await super().__call__(scope, receive, send_with_timeout)
        except TimeoutError:
            self._record.abort("stalled")  # ignored if the stream was aborted
        finally:
            self._stream.on_abort = None
            await self._stream.aclose()  # also if the client disconnected before the first chunk was read


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


async def _http_problem(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = problem_response(Rejection(error.status_code, "HTTP error", str(error.detail)))
    response.headers.update(error.headers or {})
    return response


# --- the OpenAPI document ---


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
