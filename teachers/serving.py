"""One teacher process: an engine behind uvicorn, until it is told to stop."""

import os
import signal
import socket
import sys
import threading

import uvicorn

from teachers.app import build_app
from teachers.engine import Engine
from teachers.errors import TeacherError
from teachers.service import Limits


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


async def serve(engine: Engine, sock: socket.socket, key: str | None, limits: Limits = Limits()) -> None:
    """Serve until SIGINT or SIGTERM; what is under way is finished first, for a few seconds."""
    config = uvicorn.Config(
        build_app(engine, key, limits), log_level="warning", timeout_graceful_shutdown=5, lifespan="off"
    )
    try:
        await uvicorn.Server(config).serve(sockets=[sock])
    finally:  # uvicorn raises the signal that stopped it once more
        engine.close()


def stop_with_parent() -> None:
    """End this process when its standard input closes: a parent that dies, however it dies, takes it along."""

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()
