"""The Ray Serve dialect: a teacher in the same Ray cluster, reached by a handle to its application, not by the proxy.

The address is serve://NAME; ray://HOST:PORT would be a Ray client server. Requests, responses, checks and errors are
those of the native dialect, transported by Ray. This is the only place where Ray's errors are mapped. Ray is imported
in functions: the dialect is tried for every address, and Ray is an optional dependency.
"""

import asyncio
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from teachers.client.dialects.base import ReplicaAddress
from teachers.client.dialects.native import NativeClient, NativeDialect
from teachers.client.http import Headers, Response
from teachers.protocol.errors import Overloaded, TeacherError, Unavailable
from teachers.protocol.untrusted_text import clean

SCHEME = "serve"


class RayHandleDialect:
    """Addresses with the scheme serve://."""

    unused_keys: ClassVar[Mapping[str, str]] = {**NativeDialect.unused_keys, "ca_file": "is reached without TLS"}

    async def accepts(self, address: ReplicaAddress) -> bool:
        return address.scheme == SCHEME

    def client(self, address: ReplicaAddress) -> "RayHandleClient":
        return RayHandleClient(address.teacher, address.url, address.key)


class RayHandleClient(NativeClient):
    """Client of a Serve application by its name. A ReplicaClient. Raises TeacherError for an invalid address."""

    def __init__(self, name: str, url: str, key: str | None = None) -> None:
        application = url.removeprefix(f"{SCHEME}://")
        if application == url or not re.fullmatch(r"[\w.-]+", application):
            raise TeacherError(f"teacher {name}: {url!r} is not an address: expected {SCHEME}://APPLICATION")
        super().__init__(name, url, key, sender=_Handle(application).send)


class _Handle:
    """Handle of an application. It is created for the first request, and again after a failed request."""

    def __init__(self, application: str) -> None:
        self._application = application
        self._method: Any = None

    async def send(self, method: str, path: str, headers: Headers, body: bytes) -> Response:
        with _mapped_errors():
            from ray.exceptions import RayError
            from ray.serve.exceptions import RayServeException

            if self._method is None:
                self._method = await asyncio.to_thread(_get_handle, self._application)
            pending = self._method.remote(method, path, headers, body)
            try:
                response: Response = await pending
                return response
            except asyncio.CancelledError:
                pending.cancel()  # cancels the work of the replica
                raise
            except (RayError, RayServeException):
                self._method = None  # Serve may have been restarted
                raise


def _get_handle(application: str) -> Any:
    """Return the remote method `respond` of an application. Blocks. Raises ConnectionError without a cluster."""
    import ray
    from ray import serve

    if not ray.is_initialized():
        ray.init(address="auto", log_to_driver=False)
    return serve.get_app_handle(application).options(method_name="respond")


@contextmanager
def _mapped_errors() -> Iterator[None]:
    """Convert the errors of Ray in the block into TeacherError."""
    try:
        from ray.exceptions import RayError
        from ray.serve.exceptions import BackPressureError, RayServeException
    except ImportError as error:
        raise TeacherError("Ray is not installed: install Tutelage's extra ray, or use the http:// address") from error
    try:
        yield
    except BackPressureError as error:
        raise Overloaded(clean(error), error.retry_after_s) from error
    except (RayError, RayServeException) as error:
        last_line = clean(str(error).strip().rpartition("\n")[2])  # the lines before are the replica's traceback
        raise Unavailable(f"Ray: {type(error).__name__}: {last_line}") from error
    except ConnectionError as error:
        raise Unavailable(f"no Ray cluster found: {error}") from error
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise Unavailable("Ray dropped the request") from error  # a replica that is stopped cancels its requests
