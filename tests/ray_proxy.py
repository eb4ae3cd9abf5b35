"""A server that responds to unknown paths as a proxy of Ray Serve does."""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse

from tests.serve import serving_app

NOT_FOUND = "Path '{}' not found. Ping http://.../-/routes for available routes."  # of Ray 2.58


@contextmanager
def ray_proxy(application: FastAPI, mount: str, prefix: str, num_refused: int = 0) -> Iterator[str]:
    """Imitate the proxy of Ray Serve. It answers the first `num_refused` requests with 404.

    mount   path at which the application is mounted
    prefix  prefix of the paths that the proxy passes to it
    """
    proxy, received = FastAPI(), list[str]()

    @proxy.middleware("http")
    async def route(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        path = request.url.path
        received.append(path)
        if len(received) > num_refused and path.startswith(prefix):
            return await call_next(request)
        return PlainTextResponse(NOT_FOUND.format(path), 404)

    proxy.mount(mount, application)
    with serving_app(proxy) as url:
        yield url
