"""A teacher process whose faults can be switched on and off: `python -m tests.faulty FOLDER PORT DELAY_S`.

The rows depend only on the sequence, so every replica returns the same bits, before and after a restart.
"""

import asyncio
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import httpx
import numpy as np
import uvicorn

from teachers.protocol.rows import Rows
from teachers.server.app import build_app
from teachers.server.process import stop_with_parent
from teachers.server.service import Service
from tests.rows import random_rows
from tests.serve import FormulaEngine, free_port

Fault = Literal["none", "slow", "cut", "noise", "nan", "unsorted", "foreign", "busy"]
FAULTS: tuple[Fault, ...] = get_args(Fault)
SLOW_FACTOR = 20.0


def rows_of(sequence: list[int], start: int, top_k: int, vocab_size: int) -> Rows:
    """Return the rows of every replica."""
    ids = np.array(sequence)
    return random_rows(ids, vocab_size, top_k, seed=zlib.crc32(ids.tobytes()), start=start)


class FaultyEngine(FormulaEngine):
    """Process requests one after the other, each in `delay_s` seconds."""

    fault: Fault = "none"

    def __init__(self, folder: Path, delay_s: float) -> None:
        super().__init__(folder, delay_s)
        self._one_at_a_time = asyncio.Lock()

    async def score(self, sequence: list[int], start: int, top_k: int) -> Rows:
        async with self._one_at_a_time:
            await asyncio.sleep(self.delay_s * (SLOW_FACTOR if self.fault == "slow" else 1))
        return self._with_fault(rows_of(sequence, start, top_k, self.card.vocab_size))

    def _with_fault(self, rows: Rows) -> Rows:
        match self.fault:
            case "nan":
                return replace(rows, actual=np.full_like(rows.actual, np.nan))
            case "unsorted":
                return replace(rows, logprobs=rows.logprobs[:, ::-1])
            case "foreign":
                return replace(rows, ids=rows.ids + np.uint32(self.card.vocab_size))
        return rows


def faulty_app(engine: FaultyEngine) -> Any:
    """Return the application with a route that sets the fault, and with the faults of a broken network."""
    app = build_app(Service(engine))

    @app.post("/fault/{fault}")
    async def set_fault(fault: Fault) -> None:
        engine.fault = fault

    async def faulty(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] != "/v1/score" or engine.fault not in ("cut", "noise", "busy"):
            await app(scope, receive, send)
            return
        if engine.fault == "busy":
            headers = [(b"retry-after", b"1"), (b"content-type", b"application/problem+json")]
            await send({"type": "http.response.start", "status": 503, "headers": headers})
            await send({"type": "http.response.body", "body": b"{}"})
            return

        async def send_faulty(message: Any) -> None:
            body = message.get("body", b"")
            if engine.fault == "cut" and body:
                await send({**message, "body": body[: len(body) // 2]})
                raise ConnectionError("cut within a response")
            await send({**message, "body": os.urandom(len(body))} if body else message)

        await app(scope, receive, send_faulty)

    return faulty


class FaultyTeacher:
    """A process with a faulty engine. Processes with the same folder are replicas of one teacher."""

    def __init__(self, folder: Path, delay_s: float = 0.01) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [sys.executable, "-m", "tests.faulty", str(folder), str(self.port), str(delay_s)]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> "FaultyTeacher":
        assert not self.running
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE)
        return self

    def await_ready(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                httpx.get(f"{self.url}/ready", trust_env=False).raise_for_status()
                return
            except httpx.TransportError:
                assert self.running, "the teacher process ended"
                assert time.monotonic() < deadline, "the teacher process is not ready"
                time.sleep(0.05)

    def set_fault(self, fault: Fault) -> None:
        httpx.post(f"{self.url}/fault/{fault}", trust_env=False).raise_for_status()

    def send_signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """Send SIGKILL, which also ends a process that is stopped."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()


@contextmanager
def faulty_teachers(folder: Path, count: int, delay_s: float = 0.01) -> Iterator[list[FaultyTeacher]]:
    """Start replicas of one teacher within the block, and wait until they are ready."""
    teachers = [FaultyTeacher(folder, delay_s).start() for _ in range(count)]
    try:
        for teacher in teachers:
            teacher.await_ready()
        yield teachers
    finally:
        for teacher in teachers:
            teacher.kill()


if __name__ == "__main__":
    stop_with_parent()
    config = uvicorn.Config(
        faulty_app(FaultyEngine(Path(sys.argv[1]), float(sys.argv[3]))),
        port=int(sys.argv[2]),
        log_level="critical",
        lifespan="off",
    )
    uvicorn.Server(config).run()
