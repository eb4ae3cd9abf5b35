"""One teacher process: a service behind uvicorn until it is told to stop, then until what is under way is answered."""

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

from teachers.errors import EngineDead, TeacherError
from teachers.serving.app import Guard, build_app
from teachers.serving.connections import BoundedConnection
from teachers.serving.service import Service

KEEP_ALIVE_S = 15  # longer than our own client keeps an idle connection: it never asks on one that is being closed
LAST_S = 1  # after the drain, for what is cut off


def listen_on(host: str, port: int) -> socket.socket:
    """Take the address before the model is loaded. Raises TeacherError if it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise TeacherError(
            f"cannot listen on {host}:{port} ({error.strerror}): stop what holds it or choose another --port"
        ) from error
    return sock


def tls_context(cert: Path, key: Path) -> ssl.SSLContext:
    """A certificate chain and its private key, both PEM. Raises TeacherError if they are not."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for path in (cert, key):
        try:
            path.expanduser().read_bytes()  # OpenSSL's own error does not say which file
        except OSError as error:
            raise TeacherError(f"cannot read the TLS file {path}: {error.strerror}") from error
    try:
        context.load_cert_chain(cert.expanduser(), key.expanduser(), password=lambda: "")  # never asks a terminal
    except (OSError, ValueError) as error:
        raise TeacherError(
            f"{cert} and {key} are no PEM certificate chain with its unencrypted private key: {error}"
        ) from error
    return context


class TeacherServer(uvicorn.Server):
    """Told to stop, it refuses new questions, finishes what is under way for `drain_s` seconds, and ends.

    Told twice, it ends at once.
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
                log_level="error",  # a warning for every stranger's malformed request fills disks
                access_log=False,
                proxy_headers=False,  # the log names who is connected, not who somebody claims to be
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=LAST_S,
                ssl_context_factory=(lambda *_: tls) if tls else None,
            )
        )
        self._service, self._drain_s = service, drain_s
        self._ends_at = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.draining:
            super().handle_exit(sig, frame)
            return
        self._captured_signals.append(sig)  # uvicorn raises it once more when it is done
        self._service.drain(self._drain_s)
        self._ends_at = time.monotonic() + self._drain_s

    async def on_tick(self, counter: int) -> bool:
        drained = self._service.draining and (self._service.idle or time.monotonic() >= self._ends_at)
        return await super().on_tick(counter) or drained or self._service.dead


async def serve(service: Service, sock: socket.socket, server: TeacherServer) -> None:
    """Serve until SIGINT or SIGTERM, then drain, then close the engine. Raises EngineDead once the engine is."""
    try:
        await server.serve(sockets=[sock])
    finally:  # uvicorn raises the signal that stopped it once more
        service.engine.close()
    if service.dead:
        raise EngineDead("the engine died, and so does this teacher: whoever watches it starts a new one")


def stop_with_parent() -> None:
    """End this process when its standard input closes: a parent that dies, however it dies, takes it along."""

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()
