"""HTTP client of one server. The only module that imports httpx, and the only place where its errors are mapped.

Requests are sent over the network, or by a Sender: a function that transports them in another way (ray_handle.py).
Every response has a total deadline and a byte limit. Content encodings are rejected, so that the byte limit applies to
the decoded body. Redirects are not followed, and cookies are not stored. httpx limits the head of a response to 100 kB.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import Any, NoReturn

import httpx
import msgspec

from teachers.client.addresses import canonical_url
from teachers.client.connection_errors import connection_error, speaks_tls, tls_context
from teachers.client.rate_limits import exhausted_s, retry_after_s
from teachers.protocol.decoding import decoding
from teachers.protocol.errors import (
    Conflict,
    NotDeployed,
    NotFound,
    Overloaded,
    ProtocolError,
    Rejected,
    TeacherError,
    TlsError,
    Truncated,
    Unauthorized,
    Unavailable,
)
from teachers.protocol.messages import PROBLEM, Problem
from teachers.protocol.untrusted_text import clean

KEEP_ALIVE_S = 4.0  # vLLM closes idle connections after 5 s; a request on a connection that is being closed fails
MAX_SMALL_BYTES = 64 * 1024  # of a card, a listing, an error and other small responses
# Response of a Ray Serve proxy to a path of no application, such as one that is being deployed (ray 2.58, proxy.py and
# haproxy_templates.py). An application that has no such route responds with its own 404.
RAY_NOT_FOUND = re.compile(rb"Path '.*' not found\. Ping http://\.\.\./-/routes for available routes\.", re.DOTALL)

Headers = dict[str, str]
Response = tuple[int, Headers, bytes]  # status, headers, whole body
Sender = Callable[[str, str, Headers, bytes], Awaitable[Response]]  # method, path, headers, body


class Transport:
    """Requests to one server, each with a total deadline in seconds. Close it when done.

    Raises the errors of teachers.protocol.errors. Every message starts with the kind of server, its name and
    its address.
    """

    def __init__(
        self,
        name: str,
        url: str,
        key: str | None = None,
        ca_file: Path | None = None,
        sender: Sender | None = None,
        *,
        kind: str = "teacher",
    ) -> None:
        self.url = url if sender else check_url(name, url, kind)
        self._label = f"{kind} {name} at {self.url}"
        self._ca_file = ca_file
        self._may_need_tls = sender is None and self.url.startswith("http:")  # until the first valid response
        headers = {"accept-encoding": "identity"} | ({"authorization": f"Bearer {key}"} if key else {})
        self._exhausted_until = 0.0  # no request before this time, in seconds of time.monotonic()
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers=headers,
            timeout=None,
            trust_env=False,
            follow_redirects=False,
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),  # keeps none
            verify=tls_context(self._label, httpx.create_ssl_context(trust_env=False), ca_file),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=KEEP_ALIVE_S),
            transport=_SenderTransport(sender) if sender else None,
        )

    async def aclose(self) -> None:
        await self._http.aclose()

    async def get(self, path: str, timeout_s: float, limit_bytes: int = MAX_SMALL_BYTES) -> bytes:
        """Return the body of a GET request, at most `limit_bytes`."""
        data, _ = await self._request("GET", path, timeout_s, limit_bytes)
        return data

    async def post(
        self, path: str, body: bytes, timeout_s: float, *, expect: str, limit_bytes: int, headers: Headers = {}
    ) -> bytes:
        """Send a JSON body and return the response, which must have media type `expect` and at most `limit_bytes`."""
        limits: dict[str, Any] = {"expect": expect, "limit_bytes": limit_bytes}
        data, _ = await self.post_with_headers(path, body, timeout_s, headers=headers, **limits)
        return data

    async def post_with_headers(
        self, path: str, body: bytes, timeout_s: float, *, expect: str, limit_bytes: int, headers: Headers = {}
    ) -> tuple[bytes, Headers]:
        """Send a POST request like `post`. Returns the body and the headers of the response, with lowercase names."""
        headers = {"content-type": "application/json", **headers}
        return await self._request("POST", path, timeout_s, limit_bytes, expect=expect, content=body, headers=headers)

    async def _request(
        self, method: str, path: str, timeout_s: float, limit_bytes: int, *, expect: str | None = None, **content: Any
    ) -> tuple[bytes, Headers]:
        async with self._deadline(timeout_s):
            self._check_quota(method)
            async with self._http.stream(method, path, **content) as response:
                if response.status_code != 200:
                    if response.status_code == 400:
                        await self._reject_tls_port()
                    await _raise_for_status(response, path)
                self._may_need_tls = False
                self._exhausted_until = time.monotonic() + exhausted_s(response.headers)
                return await self._read(response, limit_bytes, expect), dict(response.headers)

    def _check_quota(self, method: str) -> None:
        """Raise Overloaded if the last response stated that the quota is used up. A GET request uses no quota."""
        remaining_s = self._exhausted_until - time.monotonic()
        if method == "POST" and remaining_s > 0:
            raise Overloaded(f"its rate limit leaves nothing for {remaining_s:.1f} s (x-ratelimit-…)", remaining_s)

    async def _read(self, response: httpx.Response, limit_bytes: int, expect: str | None) -> bytes:
        """Return the body of a successful response.

        A server of web pages can return one for every path: a page in place of JSON means that there is no such route.
        """
        media_type = response.headers.get("content-type", "").partition(";")[0]
        if expect is None and media_type == "text/html":
            raise NotFound(f"{response.request.url.path} is a web page (text/html)")
        if expect is not None and media_type != expect:
            raise ProtocolError(f"expected {expect}, received {clean(media_type, 60) or 'no media type'}")
        return await _read_body(response, limit_bytes)

    def named_errors(self) -> "_NamedErrors":
        """Return a context manager that puts server and address in front of every TeacherError."""
        return _NamedErrors(self._label)

    @asynccontextmanager
    async def _deadline(self, timeout_s: float) -> AsyncIterator[None]:
        """Limit the total time and map the errors of httpx."""
        with self.named_errors():
            try:
                async with asyncio.timeout(timeout_s):
                    yield
            except TimeoutError as error:
                raise Unavailable(f"no complete response within {timeout_s:g} s") from error
            except httpx.RemoteProtocolError as error:
                await self._reject_tls_port()
                raise Truncated("the connection was closed before the response was complete") from error
            except httpx.TransportError as error:
                if isinstance(error, httpx.ReadError):
                    await self._reject_tls_port()
                raise connection_error(error, self._ca_file) from error
            except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
                raise ProtocolError(f"invalid HTTP response: {clean(error)}") from error

    async def _reject_tls_port(self) -> None:
        """Raise TlsError if the address is http:// and the server expects TLS. Not checked after a valid response."""
        url = self._http.base_url
        if self._may_need_tls and await speaks_tls(url.host, url.port or 80):
            raise TlsError("the server expects TLS: write https:// in the address")


class _SenderTransport(httpx.AsyncBaseTransport):
    """Send requests with a Sender instead of the network."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body = await request.aread()
        status, headers, data = await self._sender(request.method, request.url.path, dict(request.headers), body)
        return httpx.Response(status, headers=headers, stream=httpx.ByteStream(data))


async def send_to_app(app: Any, method: str, path: str, headers: Headers, body: bytes) -> Response:
    """Send a request to an ASGI application in this process. If the call is cancelled, so is the request."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://in-process", timeout=None) as http:
        response = await http.request(method, path, headers=headers, content=body)
    return response.status_code, dict(response.headers), response.content


def check_url(name: str, url: str, kind: str = "teacher") -> str:
    """Return the URL without trailing slashes. Raises TeacherError if it is not an HTTP URL or contains secrets."""
    canonical_url(name, url)  # for its checks: a dialect may have added a path that ends in /v1
    if not url.lower().startswith(("http://", "https://")):
        raise TeacherError(f"{kind} {name}: {url!r} is not an address: expected http://HOST:PORT")
    return str(httpx.URL(url)).rstrip("/")


class _NamedErrors:
    """Context manager that puts server and address in front of the message of a TeacherError, once."""

    def __init__(self, label: str) -> None:
        self._label = label

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, TeacherError) and not str(error).startswith(("teacher ", self._label)):
            error.args = (f"{self._label}: {error}",)


async def _raise_for_status(response: httpx.Response, route: str) -> NoReturn:
    """Raise the error that corresponds to a status other than 200."""
    data = await _read_body(response, MAX_SMALL_BYTES)
    detail = _error_detail(response.status_code, data)
    match response.status_code:
        case 403 if response.headers.get("content-type") == PROBLEM:  # of Tutelage, which refuses a key by 401
            raise Rejected(detail)
        case 401 | 403:
            has_key = "authorization" in response.request.headers
            reason = "the server rejects the key" if has_key else "the server requires a key, see key_env and key_file"
            raise Unauthorized(f"{reason} ({detail})")
        case 404 if RAY_NOT_FOUND.fullmatch(data) and response.headers.get("content-type", "").startswith("text/plain"):
            routes = response.request.url.copy_with(raw_path=b"/-/routes")
            raise NotDeployed(
                f"Ray Serve has no application at {response.request.url.path} (HTTP 404): it is not deployed yet, or "
                f"the path is wrong; {routes} lists the applications"
            )
        case 404:
            raise NotFound(f"{response.request.url.path}: {detail}")
        case 409:
            raise Conflict(detail)
        case 429 | 503:
            raise Overloaded(detail, retry_after_s(response.headers, time.time()))
        case status if status >= 500:
            raise Unavailable(detail)
        case status if status >= 400:
            raise Rejected(detail)
        case status:
            raise ProtocolError(f"expected status 200, received {status}{_redirection(response, route)}")


def _redirection(response: httpx.Response, route: str) -> str:
    """Return advice for a redirect to an absolute address, such as https://…; an empty string for others."""
    target = clean(response.headers.get("location", "").partition("?")[0], 300)
    if not response.is_redirect or not target.startswith(("http://", "https://")):
        return ""
    base = target.rstrip("/").removesuffix(route)
    return f": redirects are not followed; if {base} is the teacher, write this address"


def _error_detail(status: int, data: bytes) -> str:
    """Return the message of an error response, in the format of Tutelage or of vLLM; else only the status."""
    with suppress(ProtocolError), decoding("problem"):
        return Problem.model_validate_json(data).detail
    with suppress(ProtocolError), decoding("error of vLLM"):
        message = msgspec.json.decode(data, type=_VllmProblem).error.message
        return f"HTTP {status}, {clean(message)}"
    return f"HTTP {status}"


class _VllmError(msgspec.Struct):
    message: str


class _VllmProblem(msgspec.Struct):
    error: _VllmError


async def _read_body(response: httpx.Response, limit_bytes: int) -> bytes:
    """Return the body. Raises ProtocolError if it exceeds the limit or has a content encoding."""
    encoding = response.headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise ProtocolError(f"expected a response without content encoding, received {clean(encoding, 60)}")
    data = bytearray()
    async for chunk in response.aiter_raw():
        data += chunk
        if len(data) > limit_bytes:
            raise ProtocolError(f"expected at most {limit_bytes} bytes, received more")
    return bytes(data)
