"""Routes of a rollout server under /v1/rollouts: which weights it has, and loading new ones from a folder.

They are part of a vLLM server (vllm_plugin.py), whose --api-key guards /v1. The server reads folders below one
directory only. A request with the header of teachers/protocol/rollouts.py is refused (409) if the server has other
weights than the client expects, for example because it was restarted. While the weights are damaged, all requests that
could use them are refused (503).
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from teachers.protocol.decoding import decoding
from teachers.protocol.errors import ProtocolError
from teachers.protocol.rollouts import WEIGHTS_HEADER, SyncRequest, WeightsVersion
from teachers.protocol.untrusted_text import clean
from teachers.server.admission import Rejection
from teachers.server.problems import documented, problem_response

MAX_BODY_BYTES = 16 * 1024
OPEN_PATHS = ("/v1/rollouts/", "/health", "/metrics", "/ping", "/version")
"""Paths that respond while the weights are damaged. All others could compute with them."""

WorkerCall = Callable[..., Awaitable[list[Any]]]
"""Call a method of all workers (name, arguments) and return their results."""


class Weights:
    """The weights of a server. `call` is set when the engine runs."""

    def __init__(self, sync_dir: Path) -> None:
        self.sync_dir = sync_dir.resolve()
        self.current = WeightsVersion(version=None)
        self.call: WorkerCall | None = None
        self._lock = asyncio.Lock()

    async def sync(self, request: SyncRequest) -> WeightsVersion:
        """Load the weights of a folder, in all workers or in none. Raises Rejection."""
        folder = await asyncio.to_thread(allowed_folder, request.path, self.sync_dir)
        if self.call is None:
            raise Rejection(503, "Starting", "the engine is being started", retry_after_s=1)
        async with self._lock:
            await self._read(self.call, folder, request.digest)
            loaded = WeightsVersion(version=None, is_damaged=True)
            try:
                await self.call("load_rollout_weights")
                loaded = WeightsVersion(version=request.version, digest=request.digest)
            except Exception as error:  # vLLM passes on an error of any class, as its text
                detail = f"{folder}: loading failed ({clean(error, 150)}): synchronize again or restart the server"
                raise Rejection(500, "Weights damaged", detail) from error
            finally:
                self.current = loaded
            return loaded

    async def _read(self, call: WorkerCall, folder: Path, digest: str) -> None:
        """Read and check a folder in all workers. Raises Rejection, with the weights released in all of them."""
        reason: str | None = "interrupted"
        try:
            refused = [e for e in await call("read_rollout_weights", str(folder), digest) if e is not None]
            reason = refused[0] if refused else None
        except Exception as error:  # as above
            detail = f"{folder}: reading failed ({clean(error, 150)}); the weights are unchanged"
            raise Rejection(500, "Reading failed", detail) from error
        finally:
            if reason is not None:
                with suppress(Exception):  # the first error is the one to report
                    await call("discard_rollout_weights")
        if reason is not None:
            raise Rejection(422, "Weights refused", f"{folder}: {reason}; the weights are unchanged")


def allowed_folder(path: str, sync_dir: Path) -> Path:
    """Return the folder if it is below `sync_dir` after links are resolved. Raises Rejection (403 or 422)."""
    folder = Path(path)
    outside = Rejection(403, "Outside of --sync-dir", f"expected a folder below {sync_dir}, received {path}")
    if not folder.is_absolute() or ".." in folder.parts:
        raise outside
    try:
        resolved = folder.resolve()
        if sync_dir not in resolved.parents:
            raise outside
        is_folder = resolved.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # a name that is too long, a loop of links, a null byte
        raise outside from error
    if not is_folder:
        raise Rejection(422, "Weights refused", f"{path} is not a folder on this machine; the weights are unchanged")
    return resolved


def attach_rollout_routes(app: FastAPI, weights: Weights) -> None:
    """Add the routes for weights, and the middleware WeightsHeader, to an application."""
    app.add_middleware(WeightsHeader, weights=weights)

    @app.get("/v1/rollouts/version")
    async def version() -> WeightsVersion:
        return weights.current

    @app.post(
        "/v1/rollouts/weights", response_model=WeightsVersion, responses=documented(403, 409, 413, 415, 422, 500, 503)
    )
    async def sync(request: Request) -> Any:
        try:
            return await weights.sync(await _sync_request(request))
        except Rejection as rejection:
            return problem_response(rejection)


async def _sync_request(request: Request) -> SyncRequest:
    """Receive and validate the body. Raises Rejection."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Rejection(415, "Not JSON", "send the request with content-type: application/json")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise Rejection(413, "Too large", f"the body has over {MAX_BODY_BYTES} bytes", close=True)
    try:
        with decoding("request"):
            return SyncRequest.model_validate_json(bytes(body))
    except ProtocolError as error:
        raise Rejection(422, "Malformed", str(error)) from error


class WeightsHeader:
    """ASGI middleware that compares the tag in a request with the tag of the loaded weights.

    Requests with another tag, and all requests while the weights are damaged, are refused. Every response has the tag
    of the loaded weights in a header.
    """

    def __init__(self, app: ASGIApp, weights: Weights) -> None:
        self._app, self._weights = app, weights

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_tag(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[WEIGHTS_HEADER] = self._weights.current.tag
            await send(message)

        rejection = self._rejection(scope)
        respond = self._app if rejection is None else problem_response(rejection)
        await respond(scope, receive, send_with_tag)

    def _rejection(self, scope: Scope) -> Rejection | None:
        """Return why the request is refused, or None."""
        current, path = self._weights.current, scope["path"].removeprefix(scope.get("root_path", ""))
        if current.is_damaged and not path.startswith(OPEN_PATHS):
            detail = "loading weights failed midway, and the weights are damaged: synchronize the server or restart it"
            return Rejection(503, "Weights damaged", detail)
        expected = Headers(scope=scope).get(WEIGHTS_HEADER)
        if expected in (None, current.tag):
            return None
        return Rejection(
            409, "Other weights", f"expected the weights {expected}, this server has {current.tag}: synchronize it"
        )
