"""The server process of one teacher: uvicorn with a graceful shutdown."""

import os
import signal
import socket
import ssl
import sys
import threading
import time
from pathlib import Path
from types import FrameType

import uvicorn

from teachers.protocol.errors import EngineDead, TeacherError
from teachers.server.app import build_app
from teachers.server.connections import BoundedConnection
from teachers.server.guards import Guard
from teachers.server.service import Service

KEEP_ALIVE_S = 15  # longer than the client keeps an idle connection, so it never uses one that is being closed
CANCEL_S = 1  # after the drain, for requests that are cancelled


def listen_on(host: str, port: int) -> socket.socket:
    """Bind the address, before the model is loaded. Raises TeacherError if that fails."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise TeacherError(
            f"cannot listen on {host}:{port} ({error.strerror}): stop the process that uses it or choose another --port"
        ) from error
    return sock


def tls_context(cert: Path, key: Path) -> ssl.SSLContext:
    """Load a certificate chain and its private key, both PEM. Raises TeacherError if that fails."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for path in (cert, key):
        try:
            path.expanduser().read_bytes()  # the error of OpenSSL does not name the file
        except OSError as error:
            raise TeacherError(f"cannot read the TLS file {path}: {error.strerror}") from error
    try:
        context.load_cert_chain(cert.expanduser(), key.expanduser(), password=lambda: "")  # no prompt on a terminal
    except (OSError, ValueError) as error:
        raise TeacherError(
            f"{cert} and {key} are not a PEM certificate chain and its unencrypted private key: {error}"
        ) from error
    return context


class TeacherServer(uvicorn.Server):
    """A server that drains when it is stopped: it rejects new requests and waits up to `drain_s` for those in flight.

    A second signal stops it at once.
    """

    def __init__(
        self, service: Service, guard: Guard | None = None, tls: ssl.SSLContext | None = None, drain_s: float = 10.0
    ) -> None:
        super().__init__(
            uvicorn.Config(
                build_app(service, guard),
                http=BoundedConnection,
                ws="none",
                lifespan="off",
                log_level="error",  # a warning for every malformed request would fill disks
                access_log=False,
                proxy_headers=False,  # the request log contains the real peer, not a claimed one
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=CANCEL_S,
                ssl_context_factory=(lambda *_: tls) if tls else None,
            )
        )
        self._service, self._drain_s = service, drain_s
        self._drain_deadline = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.draining:
            super().handle_exit(sig, frame)
            return
        self._captured_signals.append(sig)  # uvicorn raises it again when it is done
        self._service.drain(self._drain_s)
        self._drain_deadline = time.monotonic() + self._drain_s

    async def on_tick(self, counter: int) -> bool:
        drained = self._service.draining and (self._service.idle or time.monotonic() >= self._drain_deadline)
        return await super().on_tick(counter) or drained or self._service.dead


async def serve(service: Service, sock: socket.socket, server: TeacherServer) -> None:
    """Serve until SIGINT or SIGTERM, drain, and close the engine. Raises EngineDead if the engine has died."""
    try:
        await server.serve(sockets=[sock])
    finally:  # uvicorn raises the signal that stopped it again
        service.engine.close()
    if service.dead:
        raise EngineDead("the engine died and this server stops: restart it")


def stop_with_parent() -> None:
    """Stop this process when its standard input closes, that is when its parent ends for any reason."""

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()
