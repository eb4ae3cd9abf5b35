"""Shutdown, backpressure, limits, metrics and request log of a server."""

import asyncio
import gc
import json
import logging
import re
import signal
import socket
import struct
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from fastapi import Response
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from teachers.backlog import HALF_LIFE_S, Backlog
from teachers.keys import Keys
from teachers.protocol.errors import EngineDead
from teachers.protocol.messages import TIMEOUT_HEADER, ScoreRequest
from teachers.protocol.rows import Rows
from teachers.server import connections
from teachers.server.admission import Rejection
from teachers.server.app import build_app
from teachers.server.guards import key_guard
from teachers.server.limits import Limits
from teachers.server.process import TeacherServer, listen_on, serve
from teachers.server.service import Service
from tests.serve import FormulaEngine, free_port, running, serving, serving_app, until

REQUEST = {"sequences": [[1, 2, 3]], "starts": [1], "top_k": 4}


def await_that(condition: Callable[[], bool], limit_s: float = 20.0) -> None:
    until = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


# --- shutdown ---


def test_a_stopped_server_finishes_requests_in_flight_and_rejects_new_ones(tiny_byte_level: Path) -> None:
    engine = FormulaEngine(tiny_byte_level)
    engine.open.clear()
    server = TeacherServer(Service(engine), drain_s=30.0)
    with running(server) as port, ThreadPoolExecutor(1) as others:
        url = f"http://127.0.0.1:{port}"
        first = others.submit(httpx.post, f"{url}/v1/score", json=REQUEST)
        await_that(lambda: engine.num_requests == 1)
        server.handle_exit(signal.SIGTERM, None)
        for refused in (httpx.get(f"{url}/ready"), httpx.post(f"{url}/v1/score", json=REQUEST)):
            assert (refused.status_code, refused.headers["connection"]) == (503, "close")
            assert refused.json()["title"] == "Draining"
            assert refused.headers["retry-after"] == "30"
        assert httpx.get(f"{url}/health").status_code == 200
        engine.open.set()
        assert first.result().status_code == 200
        assert first.result().content.endswith(b"\xff\xff\xff\xff\x00\x00\x00\x00"), "the end mark of an Arrow stream"
        await_that(lambda: not listens(port))


def test_a_server_with_a_dead_engine_stops(tiny_byte_level: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = FormulaEngine(tiny_byte_level)

    def die(rows: Rows) -> Rows:
        raise EngineDead("the GPU failed")

    engine.alter = die  # type: ignore[method-assign]
    service = Service(engine)
    with running(TeacherServer(service)) as port, caplog.at_level(logging.CRITICAL):
        with suppress(httpx.HTTPError):
            httpx.post(f"http://127.0.0.1:{port}/v1/score", json=REQUEST)
        await_that(lambda: not listens(port))
    assert service.dead


def test_a_process_with_a_dead_engine_ends_with_an_error(tiny_byte_level: Path) -> None:
    """A supervisor must not take it for a process that was stopped on purpose."""
    service = Service(FormulaEngine(tiny_byte_level))
    service.dead = True
    with listen_on("127.0.0.1", free_port()) as sock, pytest.raises(EngineDead, match="restart it"):
        asyncio.run(serve(service, sock, TeacherServer(service)))


def test_concurrent_readiness_checks_share_one_engine_check(tiny_byte_level: Path) -> None:
    engine, checks = FormulaEngine(tiny_byte_level), list[int]()

    async def check() -> None:
        checks.append(1)
        await asyncio.sleep(0.5)

    engine.check = check  # type: ignore[method-assign]
    with serving(engine) as url, ThreadPoolExecutor(8) as others:
        responses = [others.submit(httpx.get, f"{url}/ready") for _ in range(8)]
        assert {response.result().status_code for response in responses} == {200}
    assert len(checks) <= 2


def listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def test_requests_longer_than_the_drain_are_cancelled(tiny_byte_level: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = FormulaEngine(tiny_byte_level, delay_s=30.0)
    server = TeacherServer(Service(engine), drain_s=0.3)
    with caplog.at_level(logging.CRITICAL), running(server) as port, ThreadPoolExecutor(1) as others:
        first = others.submit(httpx.post, f"http://127.0.0.1:{port}/v1/score", json=REQUEST, timeout=20)
        await_that(lambda: engine.num_requests == 1)
        server.handle_exit(signal.SIGTERM, None)
        with pytest.raises(httpx.RemoteProtocolError):
            first.result()
        assert engine.cancelled == 1


# --- Retry-After ---


def test_retry_after_is_the_backlog_over_the_recent_rate() -> None:
    now = 100.0
    backlog = Backlog(lambda: now)
    assert backlog.wait_s(10_000) == 1, "nothing is known"
    backlog.enter(1000)
    now += 4.0
    assert backlog.wait_s(10_000) == 4, "as long again as it took so far"
    backlog.leave(1000, finished=True)
    now += 1000.0  # idle time message nothing about the rate
    assert backlog.tokens_per_s == pytest.approx(250)
    assert [backlog.wait_s(tokens) for tokens in (1, 2000, 10**9)] == [1, 8, 30]
    backlog.enter(10_000)
    now += HALF_LIFE_S
    backlog.leave(10_000, finished=True)
    assert 400 < backlog.tokens_per_s < 500, "what is recent weighs more"
    backlog.enter(10_000)
    now += 10 * HALF_LIFE_S
    assert backlog.wait_s(1000) == 30, "an engine that hangs has no rate"


def test_retry_after_estimates_when_the_queue_has_space(tiny_byte_level: Path) -> None:
    engine = FormulaEngine(tiny_byte_level, delay_s=0.5)
    with serving(engine, limits=Limits(max_queued_tokens=600)) as url, ThreadPoolExecutor(1) as others:
        long = {"sequences": [[1] * 100], "starts": [1], "top_k": 4}
        assert httpx.post(f"{url}/v1/score", json=long).status_code == 200  # 200 tokens a second
        full = others.submit(
            httpx.post, f"{url}/v1/score", json={**long, "sequences": [[1] * 300] * 2, "starts": [1, 1]}
        )
        await_that(lambda: engine.num_requests == 3)
        refused = httpx.post(f"{url}/v1/score", json={**long, "sequences": [[1] * 500]})
        full.result()
    assert refused.json()["detail"] == "600 of 600 tokens are queued: retry later"
    assert (
        3 <= int(refused.headers["retry-after"]) < 30
    )  # 500 tokens must leave, at 200 a second or, on a busy machine, less


def test_a_request_larger_than_the_whole_queue_is_413(tiny_byte_level: Path) -> None:
    with serving(FormulaEngine(tiny_byte_level), limits=Limits(max_queued_tokens=10)) as url:
        refused = httpx.post(f"{url}/v1/score", json={"sequences": [[1] * 11], "starts": [1], "top_k": 4})
    assert (refused.status_code, refused.json()["detail"]) == (413, "11 tokens; send at most 10")


def test_tokens_are_counted_from_admission(tiny_byte_level: Path) -> None:
    async def run() -> None:
        service = Service(FormulaEngine(tiny_byte_level), Limits(max_queued_tokens=5))
        request = ScoreRequest.model_validate(REQUEST)
        chunks = service.score(request)
        with pytest.raises(Rejection, match="3 of 5 tokens are queued"):
            service.score(request)
        assert [chunk async for chunk in chunks]
        service.score(request)  # never read at all
        await until(lambda: service.queued_tokens == 0)

    asyncio.run(run())


@pytest.mark.parametrize("num_chunks", [0, 1])
def test_closing_a_stream_cancels_its_work_even_if_nothing_was_read(tiny_byte_level: Path, num_chunks: int) -> None:
    async def run() -> None:
        engine = FormulaEngine(tiny_byte_level)
        service = Service(engine)
        request = ScoreRequest(sequences=[[1, 2, 3], [4, 5]], starts=[1, 1], top_k=4)
        stream = service.score(request)
        for _ in range(num_chunks):
            await anext(stream)
        engine.open.clear()
        waiting = service.score(request)
        await until(lambda: engine.num_requests >= 2)
        for each in (stream, waiting):
            await each.aclose()
            await each.aclose()
        assert (service.queued_tokens, service.idle) == (0, True)
        assert sample(service, 'aborted_total{reason="client_gone"}') == 2
        assert sample(service, "queued_tokens") == 0

    asyncio.run(run())


def test_a_stream_that_is_dropped_without_closing_does_not_keep_the_service_busy(tiny_byte_level: Path) -> None:
    async def run() -> None:
        service = Service(FormulaEngine(tiny_byte_level))
        service.score(ScoreRequest.model_validate(REQUEST))
        gc.collect()
        await until(lambda: service.idle)

    asyncio.run(run())


@pytest.mark.parametrize(("leaves", "reason"), [(True, "client_gone"), (False, "stalled")])
def test_work_is_cancelled_if_the_response_ends_before_its_first_chunk(
    tiny_byte_level: Path, leaves: bool, reason: str
) -> None:
    """Two pipelined requests of a client that reads nothing: the first response fills all buffers, so the head of the
    second response cannot be sent, and its chunks are not read before the client disconnects or stalls too long."""
    engine = FormulaEngine(tiny_byte_level)
    engine.open.clear()
    service = Service(engine, Limits(max_stall_s=60.0 if leaves else 0.3))
    app = build_app(service)

    @app.get("/large")
    async def large() -> Response:
        return Response(bytes(32 << 20))

    body = json.dumps(REQUEST).encode()
    with serving_app(app) as url:
        with opened(url, b"GET /large HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n" + scoring(len(body)) + body) as sock:
            await_that(lambda: engine.num_requests == 1)
            if not leaves:
                await_that(lambda: service.idle)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close with a reset
        await_that(lambda: service.idle)
    assert engine.cancelled == 1
    assert sample(service, f'aborted_total{{reason="{reason}"}}') == 1


# --- limits of connections ---


def opened(url: str, head: bytes) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    sock = socket.create_connection((host, int(port)), timeout=5)
    sock.sendall(head)
    return sock


def scoring(length: int) -> bytes:
    return (
        b"POST /v1/score HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        % length
    )


def test_a_slow_body_is_408_and_closes_the_connection(tiny_byte_level: Path) -> None:
    with serving(FormulaEngine(tiny_byte_level), limits=Limits(max_body_s=0.3)) as url:
        with opened(url, scoring(100) + b'{"seq') as slow:
            response = slow.recv(4096)
            assert response.startswith(b"HTTP/1.1 408")
            assert b"connection: close" in response
            assert slow.recv(4096) == b""


def test_the_number_of_concurrent_bodies_is_limited(tiny_byte_level: Path) -> None:
    with serving(FormulaEngine(tiny_byte_level), limits=Limits(max_bodies=2, max_body_s=2.0)) as url:

        def has_status(status: int) -> bool:
            responses.append(httpx.post(f"{url}/v1/score", json=REQUEST))
            return responses[-1].status_code == status

        responses: list[httpx.Response] = []
        held = [opened(url, scoring(100) + b"{") for _ in range(2)]
        await_that(lambda: has_status(503))
        assert responses[-1].json()["title"] == "Too many at once"
        assert responses[-1].headers["retry-after"] == "1"
        await_that(lambda: has_status(200))
        for sock in held:
            sock.close()


@pytest.mark.parametrize("head", [b"", b"POST /v1/sc", b"GET /health HTTP/1.1\r\nx: "])
def test_an_incomplete_head_closes_the_connection(
    tiny_byte_level: Path, monkeypatch: pytest.MonkeyPatch, head: bytes
) -> None:
    monkeypatch.setattr(connections, "MAX_ARRIVAL_S", 0.3)
    with serving(FormulaEngine(tiny_byte_level)) as url, opened(url, head) as half:
        assert gone(half)


def gone(sock: socket.socket) -> bool:
    try:
        return sock.recv(4096) == b""
    except ConnectionResetError:
        return True


def test_an_endless_head_closes_the_connection(tiny_byte_level: Path) -> None:
    with serving(FormulaEngine(tiny_byte_level)) as url, opened(url, b"GET /health HTTP/1.1\r\nx: ") as endless:
        sent = 0
        with suppress(ConnectionError):
            for _ in range(1000):
                endless.sendall(b"x" * 1000)
                sent += 1000
                time.sleep(0.001)
        assert sent < 10 * connections.MAX_HEAD_BYTES


def test_a_stalled_response_is_aborted(
    tiny_byte_level: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connections, "STALL_CHECK_S", 0.5)
    server = TeacherServer(Service(FormulaEngine(tiny_byte_level, max_tokens=4096), Limits(max_stall_s=0.3)))
    body = json.dumps({"sequences": [[1] * 4096] * 16, "starts": [1] * 16, "top_k": 64}).encode()
    with caplog.at_level(logging.CRITICAL), running(server) as port:
        with opened(f"http://127.0.0.1:{port}", scoring(len(body)) + body):
            await_that(lambda: sample(server._service, 'aborted_total{reason="stalled"}') == 1)
            await_that(lambda: server._service.idle and not server.server_state.connections)


def test_a_content_type_other_than_json_is_415(tiny_byte_level: Path) -> None:
    with serving(FormulaEngine(tiny_byte_level)) as url:
        body = json.dumps(REQUEST).encode()
        for kind, expected in (("text/plain", 415), ("", 415), ("Application/JSON; charset=utf-8", 200)):
            response = httpx.post(f"{url}/v1/score", content=body, headers={"content-type": kind})
            assert response.status_code == expected


# --- metrics and request log ---


def sample(service: Service, name: str) -> float | None:
    labels = dict(re.findall(r'(\w+)="([^"]*)"', name))
    return service.registry.get_sample_value(f"tutelage_{name.partition('{')[0]}", labels)


def test_metrics_count_completed_rejected_and_aborted_requests(tiny_byte_level: Path) -> None:
    engine = FormulaEngine(tiny_byte_level)
    service = Service(engine)
    with running(TeacherServer(service, key_guard(Keys(["k"])))) as port:
        http = httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"authorization": "Bearer k"})
        response = http.post("/v1/score", json={"sequences": [[1, 2, 3], [4, 5]], "starts": [1, 1], "top_k": 4})
        http.post("/v1/score", json={**REQUEST, "top_k": 65})
        http.post("/v1/score", json=REQUEST, headers={"authorization": "Bearer wrong"})
        http.get("/ready")
        engine.open.clear()
        http.post("/v1/score", json=REQUEST, headers={TIMEOUT_HEADER: "1"})
        scraped = httpx.get(f"http://127.0.0.1:{port}/metrics")
        http.close()
    found = {
        (s.name, *s.labels.values()): s.value for f in text_string_to_metric_families(scraped.text) for s in f.samples
    }
    card = engine.card
    assert found["tutelage_tokens_scored_total",] == 3
    assert found["tutelage_sequences_scored_total",] == 2
    assert found["tutelage_queued_tokens",] == 0
    assert found["tutelage_request_seconds_count",] == 2
    assert found["tutelage_engine_seconds_count",] == 2
    assert found["tutelage_rejected_total", "k_too_large"] == found["tutelage_rejected_total", "unauthorized"] == 1
    assert found["tutelage_aborted_total", "deadline"] == 1
    assert found["tutelage_sent_bytes_total",] == len(response.content)
    assert found["tutelage_engine_ready",] == 1
    assert found["tutelage_teacher_info", card.engine, card.fingerprint, card.model] == 1
    assert found["process_resident_memory_bytes",] > 0


def test_services_have_separate_metrics_unless_they_share_a_registry(tiny_byte_level: Path) -> None:
    async def score(service: Service) -> None:
        async for _ in service.score(ScoreRequest.model_validate(REQUEST)):
            pass

    one, two = (Service(FormulaEngine(tiny_byte_level)) for _ in range(2))
    shared = CollectorRegistry()
    three, four = (Service(FormulaEngine(tiny_byte_level), registry=shared) for _ in range(2))
    for service in (one, three, four):
        asyncio.run(score(service))
    assert [sample(s, "sequences_scored_total") for s in (one, two, three, four)] == [1, 0, 2, 2]


def test_the_request_log_contains_results_and_no_content(
    tiny_byte_level: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(FormulaEngine(tiny_byte_level), key="secret-key") as url:
        with caplog.at_level(logging.INFO, "tutelage.requests"):
            for request, key in (
                ({**REQUEST, "sequences": [[271, 272, 273]]}, "secret-key"),
                (REQUEST, "wrong-key"),
            ):
                response = httpx.post(f"{url}/v1/score", json=request, headers={"authorization": f"Bearer {key}"})
            httpx.get(f"{url}/v1/teacher/tokenizer/x%0Ay", headers={"authorization": "Bearer secret-key"})
    lines = [json.loads(r.message) for r in caplog.records if r.name == "tutelage.requests"]
    assert [(li["route"], li["status"], li["result"]) for li in lines] == [
        ("POST /v1/score", 200, "completed"),
        ("POST /v1/score", 401, "unauthorized"),
        ("GET /v1/teacher/tokenizer/{name}", 404, "no_such_file"),
    ]
    assert (lines[0]["sequences"], lines[0]["tokens"], lines[0]["top_k"]) == (1, 3, 4)
    assert lines[0]["bytes"] > 100
    assert lines[0]["peer"].startswith("127.0.0.1:")
    assert lines[1]["id"] == response.headers["tutelage-request"]
    assert not re.search(r"\b27[123]\b|key", caplog.text)


def test_requests_without_http_are_counted_in_the_metrics(tiny_byte_level: Path) -> None:
    async def score() -> None:
        service = Service(FormulaEngine(tiny_byte_level))
        with pytest.raises(Rejection, match="at most 64"):
            service.score(ScoreRequest.model_validate({**REQUEST, "top_k": 65}))
        chunks = service.score(ScoreRequest.model_validate(REQUEST))
        await anext(chunks)
        await chunks.aclose()
        assert sample(service, 'rejected_total{reason="k_too_large"}') == 1
        assert sample(service, 'aborted_total{reason="client_gone"}') == 1

    asyncio.run(score())
