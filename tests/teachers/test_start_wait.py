"""Waiting for teachers at the start: what is waited for, what ends the wait at once, and what is reported."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from fastapi import FastAPI, Response

from teachers.client import start_wait
from teachers.client.addresses import TeacherAddress
from teachers.client.pool import TeacherPool
from teachers.protocol.errors import (
    FingerprintMismatch,
    ProtocolError,
    TeacherError,
    Unauthorized,
    Unavailable,
    VersionMismatch,
)
from teachers.server.app import build_app
from teachers.server.limits import Limits
from teachers.server.service import Service
from tests.ray_proxy import NOT_FOUND, ray_proxy
from tests.serve import FormulaEngine, free_port, responding, serving, serving_app
from tests.teachers.test_app import respond_with_card

LIMIT_S = 30.0


@pytest.fixture(autouse=True)
def _frequent_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_wait, "RETRY_S", 0.05)
    monkeypatch.setattr(start_wait, "FIRST_REPORT_S", 0.1)


async def connect(*addresses: TeacherAddress) -> float:
    """Connect to all teachers and return the seconds it took."""
    began = time.monotonic()
    async with TeacherPool(addresses) as pool, asyncio.timeout(LIMIT_S):
        await asyncio.gather(*(pool.connect(address.name) for address in addresses))
    return time.monotonic() - began


@asynccontextmanager
async def starting_later(engine: FormulaEngine, port: int, after_s: float = 0.5) -> AsyncIterator[None]:
    """Serve an engine from `after_s` on, until the end of the block."""
    done, started = threading.Event(), asyncio.get_running_loop().time()

    def serve() -> None:
        if done.wait(after_s):
            return
        with serving(engine, port=port):
            done.wait()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
        assert asyncio.get_running_loop().time() - started >= after_s
    finally:
        done.set()
        await asyncio.to_thread(thread.join)


def test_a_run_waits_for_a_teacher_that_starts_later(tiny_byte_level: Path, caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    address = TeacherAddress("t", (f"http://127.0.0.1:{port}",), start_timeout_s=LIMIT_S)

    async def run() -> None:
        async with starting_later(FormulaEngine(tiny_byte_level), port):
            await connect(address)

    asyncio.run(run())
    reports = [message for message in caplog.messages if "waiting" in message]
    assert reports[0] == (
        f"teacher t at http://127.0.0.1:{port}: no response (connection refused); waiting for the teacher up to 30 s "
        "(start_timeout_s)"
    )
    assert "teacher t responds after" in caplog.messages[-1]


def test_reports_are_repeated_at_growing_intervals(caplog: pytest.LogCaptureFixture) -> None:
    num_attempts = 0

    async def run() -> None:
        nonlocal num_attempts
        wait = start_wait.StartWait("t", 1.0)
        while True:
            await wait.pause([Unavailable("teacher t: down")])
            num_attempts += 1

    with pytest.raises(Unavailable, match="teacher t: down .waited 1 s"):
        asyncio.run(run())
    assert num_attempts > len(caplog.messages)
    assert 2 <= len(caplog.messages) <= 4  # at 0, 0.1, 0.3 and 0.7 s
    assert caplog.messages[0] == "teacher t: down; waiting for the teacher up to 1 s (start_timeout_s)"
    assert caplog.messages[1].startswith(f"{caplog.messages[0]}, 0 s so far")


def test_a_teacher_that_is_there_is_not_reported(tiny_byte_level: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving(FormulaEngine(tiny_byte_level)) as url:
        asyncio.run(connect(TeacherAddress("t", (url,), start_timeout_s=LIMIT_S)))
    assert caplog.messages == []


def test_the_first_healthy_replica_ends_the_wait(tiny_byte_level: Path) -> None:
    ports = [free_port(), free_port()]
    address = TeacherAddress("t", tuple(f"http://127.0.0.1:{port}" for port in ports), start_timeout_s=LIMIT_S)

    async def run() -> None:
        async with starting_later(FormulaEngine(tiny_byte_level), ports[1], 0.3):
            assert await connect(address) < LIMIT_S / 2

    asyncio.run(run())


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://127.0.0.1:9", "connection refused"),
        ("http://not-there-yet.invalid:8101", "the host name cannot be resolved"),
        ("dns+http://not-there-yet.invalid:8101", "not-there-yet.invalid has no address now"),
    ],
)
def test_the_wait_ends_after_start_timeout_s_with_the_reason(url: str, reason: str) -> None:
    address = TeacherAddress("t", (url,), start_timeout_s=1.0)
    with pytest.raises(Unavailable, match=rf"teacher t.*{reason}.* \(waited 1 s: start_timeout_s of this teacher\)"):
        asyncio.run(connect(address))


@pytest.mark.parametrize("status", ["429 Slow", "503 Starting", "502 Bad Gateway", "504 Timeout"])
def test_an_overloaded_server_or_a_proxy_without_a_server_is_waited_for(status: str) -> None:
    with responding(f"HTTP/1.1 {status}\r\nretry-after: 1\r\ncontent-length: 0\r\n\r\n".encode()) as url:
        with pytest.raises(Unavailable, match=f"HTTP {status[:3]} .waited 1 s"):
            asyncio.run(connect(TeacherAddress("t", (url,), start_timeout_s=1.0)))


def test_retry_after_is_followed_at_the_start_too(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start_wait, "REPORT_PAUSE_S", 1.0)
    app, paths = FastAPI(), list[str]()

    @app.get("/{path:path}")
    async def refuse(path: str) -> Response:
        paths.append(path)
        return Response(status_code=429, headers={"retry-after": "1"})

    with serving_app(app) as url, pytest.raises(Unavailable, match="HTTP 429 .waited 1.5 s"):
        asyncio.run(connect(TeacherAddress("t", (url,), start_timeout_s=1.5)))
    assert paths == ["v1/teacher"] * 3  # at 0, 1 and 1.5 s
    assert caplog.messages[0].endswith("(start_timeout_s), next attempt in 1 s (the server asked for it)")


def not_found(body: str, media_type: str = "text/plain") -> bytes:
    """Return a response with status 404."""
    head = f"HTTP/1.1 404 Not Found\r\ncontent-type: {media_type}\r\ncontent-length: {len(body)}\r\n\r\n"
    return (head + body).encode()


def gemma_on_ray(engine: FormulaEngine, num_refused: int) -> AbstractContextManager[str]:
    """Serve an engine below /gemma behind a proxy of Ray Serve."""
    return ray_proxy(build_app(Service(engine, Limits())), "/gemma", "/gemma", num_refused)


def test_an_application_that_ray_serve_deploys_later_is_waited_for(
    tiny_byte_level: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with gemma_on_ray(FormulaEngine(tiny_byte_level), num_refused=3) as url:
        asyncio.run(connect(TeacherAddress("t", (f"{url}/gemma",), start_timeout_s=LIMIT_S)))
    assert caplog.messages[0] == (
        f"teacher t at {url}/gemma: Ray Serve has no application at /gemma/v1/teacher (HTTP 404): it is not deployed "
        f"yet, or the path is wrong; {url}/-/routes lists the applications; waiting for the teacher up to 30 s "
        "(start_timeout_s)"
    )


def test_a_path_that_ray_serve_never_has_is_reported_when_the_time_is_over(tiny_byte_level: Path) -> None:
    with gemma_on_ray(FormulaEngine(tiny_byte_level), num_refused=0) as url:
        address = TeacherAddress("t", (f"{url}/wrong",), start_timeout_s=0.5)
        with pytest.raises(Unavailable, match=r"no application at /wrong/v1/teacher .HTTP 404.*waited 0.5 s"):
            asyncio.run(connect(address))
        ends_at_once(Unavailable, "no application at /wrong/v1/teacher", replace(address, start_timeout_s=0.0))


def test_a_route_that_an_application_of_ray_serve_lacks_ends_the_start_at_once(tiny_byte_level: Path) -> None:
    with gemma_on_ray(FormulaEngine(tiny_byte_level), num_refused=0) as url:
        address = TeacherAddress("t", (f"{url}/gemma/wrong",), start_timeout_s=LIMIT_S)
        ends_at_once(TeacherError, "it has no teacher below /gemma/wrong", address)


def test_an_engine_that_is_not_ready_is_waited_for(tiny_byte_level: Path) -> None:
    class NotReady(FormulaEngine):
        async def check(self) -> None:
            raise RuntimeError("the model is loading")

    with serving(NotReady(tiny_byte_level)) as url:
        with pytest.raises(Unavailable, match="the engine does not respond.*waited 1 s"):
            asyncio.run(connect(TeacherAddress("t", (url,), start_timeout_s=1.0)))


def ends_at_once(error: type[TeacherError], message: str, *addresses: TeacherAddress) -> None:
    began = time.monotonic()
    with pytest.raises(error, match=message) as raised:
        asyncio.run(connect(*addresses))
    assert time.monotonic() - began < LIMIT_S / 3
    assert "waited" not in str(raised.value)


@pytest.mark.parametrize(
    ("response", "error", "message"),
    [
        (b"HTTP/1.1 401 No\r\ncontent-length: 0\r\n\r\n", Unauthorized, "the server requires a key"),
        (b"HTTP/1.1 404 No\r\ncontent-length: 0\r\n\r\n", TeacherError, "the address is not that of a teacher"),
        (not_found("Path '/v1/teacher' not found."), TeacherError, "the address is not that of a teacher"),
        (not_found(NOT_FOUND, "text/html"), TeacherError, "the address is not that of a teacher"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\n<html>", ProtocolError, "malformed card"),
        (respond_with_card(protocol="1"), VersionMismatch, "expected protocol 3, received 1"),
    ],
)
def test_what_waiting_cannot_correct_ends_the_start_at_once(
    response: bytes, error: type[TeacherError], message: str
) -> None:
    with responding(response) as url:
        ends_at_once(error, message, TeacherAddress("t", (url,), start_timeout_s=LIMIT_S))


def test_a_fault_of_one_teacher_or_replica_ends_the_wait_for_the_others(tiny_byte_level: Path) -> None:
    down = f"http://127.0.0.1:{free_port()}"
    engines = FormulaEngine(tiny_byte_level), FormulaEngine(tiny_byte_level, fingerprint="0" * 64)
    with serving(engines[0], key="secret") as locked, serving(engines[0]) as one, serving(engines[1]) as two:
        away = TeacherAddress("away", (down,), start_timeout_s=LIMIT_S)
        ends_at_once(Unauthorized, "t at", away, TeacherAddress("t", (locked,), start_timeout_s=LIMIT_S))
        ends_at_once(Unauthorized, "t at", TeacherAddress("t", (down, locked), start_timeout_s=LIMIT_S))
        ends_at_once(FingerprintMismatch, "t at", TeacherAddress("t", (down, one, two), start_timeout_s=LIMIT_S))


def test_without_start_timeout_s_connecting_tries_once() -> None:
    address = TeacherAddress("t", (f"http://127.0.0.1:{free_port()}",))
    ends_at_once(Unavailable, r"no response \(connection refused\)$", address)


@pytest.mark.parametrize("list_replicas", [lambda port: f"http://127.0.0.1:{port}\n"])
def test_a_replica_that_is_listed_during_the_wait_is_used(
    tiny_byte_level: Path, tmp_path: Path, list_replicas: Callable[[int], str]
) -> None:
    listed, port = tmp_path / "replicas", free_port()
    listed.write_text(list_replicas(free_port()))
    address = TeacherAddress("t", (), urls_file=listed, start_timeout_s=LIMIT_S)

    async def run() -> None:
        with serving(FormulaEngine(tiny_byte_level), port=port):
            asyncio.get_running_loop().call_later(0.3, listed.write_text, list_replicas(port))
            await connect(address)

    asyncio.run(run())
