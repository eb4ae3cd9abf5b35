"""Authorization of requests: by key or, for a server without a key on loopback, by the headers Host and Origin.

A web page in a browser on this machine can send requests to loopback. With DNS rebinding (a host name of the page that
resolves to 127.0.0.1) it can also read the responses. In both cases Host or Origin contains the name of the page.
"""

import ipaddress
import re
from collections.abc import Awaitable, Callable

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from teachers.keys import Keys
from teachers.server.admission import Rejection
from teachers.server.problems import problem_response
from teachers.server.service import Service

Guard = Callable[[Request], Awaitable[None]]
_HOST = re.compile(r"(\[[^\]]*\]|[^:\[\]]*)(:[0-9]*)?")  # a name or address, and a port


def key_guard(keys: Keys) -> Guard:
    """Return a guard that raises Rejection (401) unless the request has one of the keys.

    If there are several keys, fair shares count each key as one client.
    """

    async def check(request: Request) -> None:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if not keys.accepts(key.encode()) or scheme.lower() != "bearer":
            raise Rejection(401, "Unauthorized", "send the teacher's key as 'Authorization: Bearer KEY'")
        if len(keys) > 1:
            request.state.record.client = f"key {hash(key)}"

    return check


def is_loopback(host: str) -> bool:
    """Return whether a name or address is reachable from this machine only."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower() == "localhost"
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


class LoopbackGuard:
    """ASGI middleware that rejects requests of web pages on loopback connections, for servers without a key.

    Connections to other addresses are not checked, because their Host can be any name of this machine.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        server = scope.get("server")
        rejection = None
        if scope["type"] == "http" and server and is_loopback(server[0]):
            rejection = _from_web_page(Headers(scope=scope), scope.get("scheme", "http"))
        if rejection is None:
            await self._app(scope, receive, send)
            return
        client = scope.get("client")
        record = self._service.new_record(f"{client[0]}:{client[1]}" if client else None, "rejected")
        record.reject(rejection.problem.status, rejection.reason)
        await problem_response(rejection)(scope, receive, send)


def _from_web_page(headers: Headers, scheme: str) -> Rejection | None:
    hosts, origins = headers.getlist("host"), headers.getlist("origin")
    host = hosts[0] if len(hosts) == 1 else ""
    parts = _HOST.fullmatch(host)
    if parts is None or not is_loopback(parts[1].strip("[]")):
        detail = (
            f"expected Host localhost, 127.0.0.1 or [::1], received {', '.join(hosts) or 'none'}: use such an address, "
            "or start the teacher with a key"
        )
        return Rejection(421, "Foreign host", detail, close=True)
    if any(origin.lower() != f"{scheme}://{host.lower()}" for origin in origins):
        detail = f"a teacher without a key serves no web pages, received Origin {', '.join(origins)}: remove the header"
        return Rejection(403, "Foreign origin", detail, close=True)
    return None
