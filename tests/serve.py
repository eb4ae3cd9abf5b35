"""Teacher servers on loopback, in threads, and an engine without a model."""

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import numpy as np
import uvicorn
from fastapi import FastAPI

from alignment import Vocabulary
from teachers.engines.base import Engine
from teachers.keys import Keys
from teachers.protocol.messages import TeacherCard
from teachers.protocol.rows import Rows
from teachers.server.guards import key_guard
from teachers.server.limits import Limits
from teachers.server.process import TeacherServer
from teachers.server.service import Service
from tests.rows import random_rows

FIRST_PORT, PORTS_PER_WORKER, NUM_WORKERS = 20_000, 3_000, 4
_port_numbers = count(os.getpid())


class FormulaEngine:
    """Return `random_rows` after `delay_s`, once `open` is set. Count started, finished and cancelled calls."""

    def __init__(self, folder: Path, delay_s: float = 0.0, **card: object) -> None:
        vocabulary = Vocabulary.load(folder)
        self.delay_s, self.open = delay_s, threading.Event()
        self.open.set()
        self.num_requests = self.finished = self.cancelled = 0
        self._files = {"tokenizer.json": (folder / "tokenizer.json").read_bytes()}
        values = {
            "model": folder.name,
            "fingerprint": "f" * 64,
            "engine": "formula",
            "dtype": "float32",
            "vocab_size": len(vocabulary),
            "tokenizer_sha256": vocabulary.fingerprint,
            "bos_id": vocabulary.roles["bos"],
            "eos_id": vocabulary.roles["eos"],
            "expects_bos": vocabulary.expects_bos,
            "max_tokens": 512,
            "max_top_k": 64,
        }
        self._card = TeacherCard.model_validate(values | card)

    @property
    def card(self) -> TeacherCard:
        return self._card

    @property
    def tokenizer_files(self) -> dict[str, bytes]:
        return self._files

    async def score(self, sequence: list[int], start: int, top_k: int) -> Rows:
        self.num_requests += 1
        try:
            while not self.open.is_set():
                await asyncio.sleep(0.005)
            await asyncio.sleep(self.delay_s)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        self.finished += 1
        rows = random_rows(np.array(sequence), self._card.vocab_size, top_k, seed=len(sequence), start=start)
        return self.alter(rows)

    def alter(self, rows: Rows) -> Rows:
        """Return the rows to send; tests replace this method."""
        return rows

    async def check(self) -> None:
        return None

    def close(self) -> None:
        return None


@contextmanager
def serving(engine: Engine, key: str | None = None, limits: Limits = Limits(), port: int = 0) -> Iterator[str]:
    """Run a teacher server within the block. Yields its address."""
    server = TeacherServer(Service(engine, limits), key_guard(Keys([key])) if key else None)
    with running(server, port) as port:
        yield f"http://127.0.0.1:{port}"


@contextmanager
def serving_app(app: FastAPI) -> Iterator[str]:
    """Run any application within the block. Yields its address."""
    config = uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
    with running(uvicorn.Server(config)) as port:
        yield f"http://127.0.0.1:{port}"


@contextmanager
def running(server: uvicorn.Server, port: int = 0) -> Iterator[int]:
    """Run a server in a thread within the block. Yields its port. The server may stop earlier."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port))
    port = sock.getsockname()[1]
    thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            threading.Event().wait(0.005)
        yield port
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        sock.close()
        assert not thread.is_alive()


@contextmanager
def responding(response: bytes, hang_up: bool = True) -> Iterator[str]:
    """Run a server that sends the same bytes to every client. Yields its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    stop = threading.Event()

    def work() -> None:
        listener.settimeout(0.05)
        held = []
        while not stop.is_set():
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            connection.settimeout(1.0)
            connection.recv(1 << 16)
            connection.sendall(response)
            if hang_up:
                connection.close()
            held.append(connection)
        for connection in held:
            connection.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        stop.set()
        thread.join(timeout=5)
        listener.close()


async def until(condition: Callable[[], bool], limit_s: float = 20.0) -> None:
    """Wait until the condition holds. Raises TimeoutError."""
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.01)


def free_port() -> int:
    """Return a port on which nothing listens, another one at every call.

    It is below the ports that the system assigns, and in a range of this worker of pytest-xdist, so that nothing else
    takes it before the test does.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = FIRST_PORT + worker % NUM_WORKERS * PORTS_PER_WORKER + next(_port_numbers) % PORTS_PER_WORKER
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
