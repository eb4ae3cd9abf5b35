"""HTTP to one server process. The only file that imports httpx, and the one place its errors are mapped.

What carries a request is a network, or a Carrier: then the same exchange goes by other means, to the same errors.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import msgspec
from pydantic import ValidationError

from teachers.errors import (
    NotFound,
    Overloaded,
    ProtocolError,
    Rejected,
    TeacherError,
    Truncated,
    Unauthorized,
    Unavailable,
)
from teachers.protocol import Problem

KEPT_S = 4.0  # an idle connection; vLLM's server closes it after 5, and one that closes as it is used has failed
ERROR_BYTES = 64 * 1024  # of an error's body
DETAIL_CHARS = 300  # of what it says

Headers = dict[str, str]
Reply = tuple[int, Headers, bytes]  # status, headers, the whole body
Carrier = Callable[[str, str, Headers, bytes], Awaitable[Reply]]  # of method, path, headers, body


class Transport:
    """Bytes to and from one server; every call has a total deadline in seconds. Close it when done.

    Raises the errors of teachers.errors, each message beginning with the teacher's name and address.
    """

    def __init__(
        self,
        name: str,
        url: str,
        key: str | None = None,
        ca_file: Path | None = None,
        carrier: Carrier | None = None,
    ) -> None:
        self.url = url if carrier else check_url(name, url)
        self._who = f"teacher {name} at {self.url}"
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers=headers,
            timeout=None,
            trust_env=False,
            verify=_tls(self._who, ca_file),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=KEPT_S),
            transport=_Carried(carrier) if carrier else None,
        )

    async def aclose(self) -> None:
        await self._http.aclose()

    async def get(self, path: str, timeout_s: float) -> bytes:
        async with self._deadline(timeout_s), self._http.stream("GET", path) as response:
            await _raise_for_status(response)
            return await response.aread()

    async def post(
        self, path: str, body: bytes, timeout_s: float, *, expect: str, limit_bytes: int, headers: dict[str, str] = {}
    ) -> bytes:
        """The whole answer to a JSON body, of the media type `expect` and at most `limit_bytes` long."""
        headers = {"content-type": "application/json", **headers}
        async with self._deadline(timeout_s):
            async with self._http.stream("POST", path, content=body, headers=headers) as response:
                await _raise_for_status(response)
                if (kind := response.headers.get("content-type", "").partition(";")[0]) != expect:
                    raise ProtocolError(f"expected {expect}, received {kind or 'no media type'}")
                return await _read(response, limit_bytes)

    def named(self) -> "_Named":
        """A context that puts the teacher's name in front of every error of ours."""
        return _Named(self._who)

    @asynccontextmanager
    async def _deadline(self, timeout_s: float) -> AsyncIterator[None]:
        """A total time limit, and httpx's errors as ours."""
        with self.named():
            try:
                async with asyncio.timeout(timeout_s):
                    yield
            except TimeoutError as error:
                raise Unavailable(f"no complete answer within {timeout_s:g} s") from error
            except httpx.RemoteProtocolError as error:
                raise Truncated("the connection was closed before the answer was complete") from error
            except httpx.TransportError as error:
                raise Unavailable(f"nothing answers ({type(error).__name__})") from error
            except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
                raise ProtocolError(f"no valid HTTP exchange: {error}") from error


class _Carried(httpx.AsyncBaseTransport):
    """Lets a Carrier do what the network does."""

    def __init__(self, carrier: Carrier) -> None:
        self._carrier = carrier

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body = await request.aread()
        status, headers, data = await self._carrier(request.method, request.url.path, dict(request.headers), body)
        return httpx.Response(status, headers=headers, content=data)


async def ask_app(app: Any, method: str, path: str, headers: Headers, body: bytes) -> Reply:
    """What an ASGI application in this process answers. Cancelling the wait cancels its work."""
    inside = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=inside, base_url="http://inside", timeout=None) as http:
        answer = await http.request(method, path, headers=headers, content=body)
    return answer.status_code, dict(answer.headers), answer.content


def check_url(name: str, url: str) -> str:
    """The address without a trailing slash. Raises TeacherError if it is none."""
    try:
        parsed = httpx.URL(url.rstrip("/"))
    except httpx.InvalidURL as error:
        raise TeacherError(f"teacher {name}: {url!r} is no address ({error})") from error
    if parsed.scheme not in ("http", "https") or not parsed.host or not 0 < (parsed.port or 80) < 65536:
        raise TeacherError(f"teacher {name}: {url!r} is no address: expected http://HOST:PORT")
    return str(parsed).rstrip("/")


def _tls(who: str, ca_file: Path | None) -> ssl.SSLContext | bool:
    if ca_file is None:
        return True
    try:
        return ssl.create_default_context(cafile=str(ca_file.expanduser()))
    except OSError as error:
        raise TeacherError(f"{who}: cannot read certificates from {ca_file}: {error}") from error


class _Named:
    """Puts the teacher's name in front of an error's message, once."""

    def __init__(self, who: str) -> None:
        self._who = who

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, TeacherError) and not str(error).startswith("teacher "):
            error.args = (f"{self._who}: {error}",)


async def _raise_for_status(response: httpx.Response) -> None:
    if response.status_code == 200:
        return
    detail = _detail(response.status_code, await _read(response, ERROR_BYTES))
    match response.status_code:
        case 401 | 403:
            sent = "authorization" in response.request.headers
            raise Unauthorized(f"{'its key is not the one that was sent' if sent else 'it asks for a key'} ({detail})")
        case 404:
            raise NotFound(f"{response.request.url.path}: {detail}")
        case 429 | 503:
            raise Overloaded(detail, _retry_after_s(response))
        case status if status >= 500:
            raise Unavailable(detail)
        case status if status >= 400:
            raise Rejected(detail)
        case status:
            raise ProtocolError(f"expected status 200, received {status}")


def _detail(status: int, data: bytes) -> str:
    """What the server says of its error: in our words, in vLLM's, or not at all."""
    with suppress(ValidationError):
        return Problem.model_validate_json(data).detail
    with suppress(msgspec.DecodeError):
        said = msgspec.json.decode(data, type=_VllmProblem).error.message
        return f"HTTP {status}, {' '.join(said.split())[:DETAIL_CHARS]}"
    return f"HTTP {status}"


class _VllmError(msgspec.Struct):
    message: str


class _VllmProblem(msgspec.Struct):
    error: _VllmError


def _retry_after_s(response: httpx.Response) -> float | None:
    value = response.headers.get("retry-after", "")
    return float(value) if value.isdecimal() else None


async def _read(response: httpx.Response, limit_bytes: int) -> bytes:
    data = bytearray()
    async for chunk in response.aiter_bytes():
        data += chunk
        if len(data) > limit_bytes:
            raise ProtocolError(f"expected at most {limit_bytes} bytes, received more")
    return bytes(data)
