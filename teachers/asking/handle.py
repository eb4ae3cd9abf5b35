"""A teacher in the same Ray cluster, asked by a handle to its Serve application instead of through the proxy.

Its address is serve://NAME: ray://HOST:PORT already means a Ray client's server. Request, answer, checks and refusals
are those of HTTP, carried by Ray; this is the one place where Ray's errors become ours.
"""

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException

from teachers.asking.client import TeacherClient
from teachers.asking.transport import Headers, Reply
from teachers.errors import Overloaded, TeacherError, Unavailable

SCHEME = "serve://"


class HandleClient(TeacherClient):
    """A teacher by the name of its Serve application. A Client. Raises TeacherError for an address that is none."""

    def __init__(self, name: str, url: str, key: str | None = None) -> None:
        application = url.removeprefix(SCHEME)
        if not url.startswith(SCHEME) or not re.fullmatch(r"[\w.-]+", application):
            raise TeacherError(f"teacher {name}: {url!r} is no address: expected {SCHEME}APPLICATION")
        super().__init__(name, url, key, carrier=_Handle(application).carry)


class _Handle:
    """A handle, taken when it is first needed, and again after it has failed."""

    def __init__(self, application: str) -> None:
        self._application = application
        self._ask: Any = None

    async def carry(self, method: str, path: str, headers: Headers, body: bytes) -> Reply:
        with _ray_errors():
            if self._ask is None:
                self._ask = await asyncio.to_thread(_find, self._application)
            response = self._ask.remote(method, path, headers, body)
            try:
                reply: Reply = await response
                return reply
            except asyncio.CancelledError:
                response.cancel()  # in the replica too
                raise
            except (RayError, RayServeException):
                self._ask = None  # Serve may have been started anew
                raise


def _find(application: str) -> Any:
    """The method that every replica answers. Blocks. Raises ConnectionError where there is no cluster."""
    if not ray.is_initialized():
        ray.init(address="auto", log_to_driver=False)
    return serve.get_app_handle(application).options(method_name="ask")


@contextmanager
def _ray_errors() -> Iterator[None]:
    """Ray's errors as ours."""
    try:
        yield
    except BackPressureError as error:
        raise Overloaded(str(error), error.retry_after_s) from error
    except (RayError, RayServeException) as error:
        last_line = str(error).strip().rpartition("\n")[2]  # before it comes the replica's traceback
        raise Unavailable(f"Ray: {type(error).__name__}: {last_line}") from error
    except ConnectionError as error:
        raise Unavailable(f"there is no Ray cluster here: {error}") from error
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise Unavailable("Ray dropped the request") from error  # a replica that is stopped cancels what it works on
