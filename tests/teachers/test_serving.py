"""What a server tells, what it lets others hold, and how it ends."""

import asyncio
import json
import logging
import re
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from teachers.backlog import HALF_LIFE_S, Backlog
from teachers.errors import EngineDead
from teachers.keys import Keys
from teachers.limits import Limits
from teachers.protocol import TIMEOUT_HEADER, ScoreRequest
from teachers.rows import Rows
from teachers.serving import connections
from teachers.serving.app import key_guard
from teachers.serving.process import TeacherServer, listen_on, serve
from teachers.serving.service import Refusal, Service
from tests.serve import FormulaEngine, free_port, running, serving, until

QUESTION = {"sequences": [[1, 2, 3]], "starts": [1], "top_k": 4}


def await_that(condition: Callable[[], bool], limit_s: float = 20.0) -> None:
    until = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


# --- how it ends ---


def test_a_server_told_to_stop_finishes_what_is_under_way_and_refuses_what_is_new(tiny_byte_level: Path) -> None:
    engine = FormulaEngine(tiny_byte_level)
    engine.open.clear()
    server = TeacherServer(Service(engine), drain_s=30.0)
    with running(server) as port, ThreadPoolExecutor(1) as others:
        url = f"http://127.0.0.1:{port}"
        first = others.submit(httpx.post, f"{url}/v1/score", json=QUESTION)
        await_that(lambda: engine.asked == 1)
        server.handle_exit(signal.SIGTERM, None)
        for refused in (httpx.get(f"{url}/ready"), httpx.post(f"{url}/v1/score", json=QUESTION)):
            assert (refused.status_code, refused.headers["connection"]) == (503, "close")
            assert refused.json()["title"] == "Draining"
            assert refused.headers["retry-after"] == "30"
        assert httpx.get(f"{url}/health").status_code == 200
        engine.open.set()
        assert first.result().status_code == 200
        assert first.result().content.endswith(b"\xff\xff\xff\xff\x00\x00\x00\x00"), "the end mark of an Arrow stream"
        await_that(lambda: not listens(port))


def test_a_server_whose_engine_is_dead_ends(tiny_byte_level: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = FormulaEngine(tiny_byte_level)

    def die(rows: Rows) -> Rows:
        raise EngineDead("the GPU failed")

    engine.alter = die  # type: ignore[method-assign]
    service = Service(engine)
    with running(TeacherServer(service)) as port, caplog.at_level(logging.CRITICAL):
        with suppress(httpx.HTTPError):
            httpx.post(f"http://127.0.0.1:{port}/v1/score", json=QUESTION)
        await_that(lambda: not listens(port))
    assert service.dead


def test_a_teacher_whose_engine_is_dead_ends_with_an_error(tiny_byte_level: Path) -> None:
    """Or whoever watches the process would take it for one that was told to end."""
    service = Service(FormulaEngine(tiny_byte_level))
    service.dead = True
    with listen_on("127.0.0.1", free_port()) as sock, pytest.raises(EngineDead, match="starts a new one"):
        asyncio.run(serve(service, sock, TeacherServer(service)))


def test_an_idle_engine_is_asked_once_for_all_who_want_to_know_whether_it_is_ready(tiny_byte_level: Path) -> None:
    engine, checks = FormulaEngine(tiny_byte_level), list[int]()

    async def check() -> None:
        checks.append(1)
        await asyncio.sleep(0.5)

    engine.check = check  # type: ignore[method-assign]
    with serving(engine) as url, ThreadPoolExecutor(8) as others:
        answers = [others.submit(httpx.get, f"{url}/ready") for _ in range(8)]
        assert {answer.result().status_code for answer in answers} == {200}
    assert len(checks) <= 2


def listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def test_what_takes_longer_than_the_drain_is_cut_off(tiny_byte_level: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = FormulaEngine(tiny_byte_level, delay_s=30.0)
    server = TeacherServer(Service(engine), drain_s=0.3)
    with caplog.at_level(logging.CRITICAL), running(server) as port, ThreadPoolExecutor(1) as others:
        first = others.submit(httpx.post, f"http://127.0.0.1:{port}/v1/score", json=QUESTION, timeout=20)
        await_that(lambda: engine.asked == 1)
        server.handle_exit(signal.SIGTERM, None)
        with pytest.raises(httpx.RemoteProtocolError):
            first.result()
        assert engine.dropped == 1


# --- Retry-After ---


def test_the_time_to_wait_is_the_backlog_over_the_recent_rate() -> None:
    now = 100.0
    backlog = Backlog(lambda: now)
    assert backlog.wait_s(10_000) == 1, "nothing is known"
    backlog.enter(1000)
    now += 4.0
    assert backlog.wait_s(10_000) == 4, "as long again as it took so far"
    backlog.leave(1000, answered=True)
    now += 1000.0  # idle time says nothing about the rate
    assert backlog.tokens_per_s == pytest.approx(250)
    assert [backlog.wait_s(tokens) for tokens in (1, 2000, 10**9)] == [1, 8, 30]
    backlog.enter(10_000)
    now += HALF_LIFE_S
    backlog.leave(10_000, answered=True)
    assert 400 < backlog.tokens_per_s < 500, "what is recent weighs more"
    backlog.enter(10_000)
    now += 10 * HALF_LIFE_S
    assert backlog.wait_s(1000) == 30, "an engine that hangs has no rate"


def test_retry_after_tells_when_there_is_room(tiny_byte_level: Path) -> None:
    engine = FormulaEngine(tiny_byte_level, delay_s=0.5)
    with serving(engine, limits=Limits(max_queued_tokens=600)) as url, ThreadPoolExecutor(1) as others:
        long = {"sequences": [[1] * 100], "starts": [1], "top_k": 4}
        assert httpx.post(f"{url}/v1/score", json=long).status_code == 200  # 200 tokens a second
        full = others.submit(
            httpx.post, f"{url}/v1/score", json={**long, "sequences": [[1] * 300] * 2, "starts": [1, 1]}
        )
        await_that(lambda: engine.asked == 3)
        refused = httpx.post(f"{url}/v1/score", json={**long, "sequences": [[1] * 500]})
        full.result()
    assert refused.json()["detail"] == "600 of 600 tokens are waiting: ask later"
    assert (
        3 <= int(refused.headers["retry-after"]) < 30
    )  # 500 tokens must leave, at 200 a second or, on a busy machine, less


def test_a_question_that_no_empty_queue_could_hold_is_too_large_not_early(tiny_byte_level: Path) -> None:
    with serving(FormulaEngine(tiny_byte_level), limits=Limits(max_queued_tokens=10)) as url:
        refused = httpx.post(f"{url}/v1/score", json={"sequences": [[1] * 11], "starts": [1], "top_k": 4})
    assert (refused.status_code, refused.json()["detail"]) == (413, "11 tokens; send at most 10")


def test_tokens_are_counted_from_the_moment_of_admission(tiny_byte_level: Path) -> None:
    async def run() -> None:
        service = Service(FormulaEngine(tiny_byte_level), Limits(max_queued_tokens=5))
        question = ScoreRequest.model_validate(QUESTION)
        chunks = service.answer(question)
        with pytest.raises(Refusal, match="3 of 5 tokens are waiting"):
            service.answer(question)
        assert [chunk async for chunk in chunks]
        service.answer(question)  # never read at all
        await until(lambda: service.queued_tokens == 0)

    asyncio.run(run())


# --- who holds what, and for how long ---


def opened(url: str, head: bytes) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    sock = socket.create_connection((host, int(port)), timeout=5)
    sock.sendall(head)
    return sock


def scoring(length: int) -> bytes:
    return b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % length


def test_a_body_that_comes_too_slowly_is_408_and_ends_the_connection(tiny_byte_level: Path) -> None:
    with serving(FormulaEngine(tiny_byte_level), limits=Limits(max_body_s=0.3)) as url:
        with opened(url, scoring(100) + b'{"seq') as slow:
            answer = slow.recv(4096)
            assert answer.startswith(b"HTTP/1.1 408")
            assert b"connection: close" in answer
            assert slow.recv(4096) == b""


def test_only_so_many_bodies_are_read_at_once(tiny_byte_level: Path) -> None:
    with serving(FormulaEngine(tiny_byte_level), limits=Limits(max_bodies=2, max_body_s=2.0)) as url:

        def answered(status: int) -> bool:
            answers.append(httpx.post(f"{url}/v1/score", json=QUESTION))
            return answers[-1].status_code == status

        answers: list[httpx.Response] = []
        held = [opened(url, scoring(100) + b"{") for _ in range(2)]
        await_that(lambda: answered(503))
        assert answers[-1].json()["title"] == "Too many at once"
        assert answers[-1].headers["retry-after"] == "1"
        await_that(lambda: answered(200))
        for sock in held:
            sock.close()


@pytest.mark.parametrize("head", [b"", b"POST /v1/sc", b"GET /health HTTP/1.1\r\nx: "])
def test_a_head_that_does_not_end_ends_the_connection(
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


def test_a_head_without_end_ends_the_connection(tiny_byte_level: Path) -> None:
    with serving(FormulaEngine(tiny_byte_level)) as url, opened(url, b"GET /health HTTP/1.1\r\nx: ") as endless:
        sent = 0
        with suppress(ConnectionError):
            for _ in range(1000):
                endless.sendall(b"x" * 1000)
                sent += 1000
                time.sleep(0.001)
        assert sent < 10 * connections.MAX_HEAD_BYTES


def test_a_client_that_takes_nothing_of_its_answer_loses_it(
    tiny_byte_level: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connections, "LOOK_S", 0.5)
    server = TeacherServer(Service(FormulaEngine(tiny_byte_level, max_tokens=4096), Limits(max_stall_s=0.3)))
    body = json.dumps({"sequences": [[1] * 4096] * 16, "starts": [1] * 16, "top_k": 64}).encode()
    with caplog.at_level(logging.CRITICAL), running(server) as port:
        with opened(f"http://127.0.0.1:{port}", scoring(len(body)) + body):
            await_that(lambda: sample(server._service, 'aborted_total{reason="stalled"}') == 1)
            await_that(lambda: server._service.idle and not server.server_state.connections)


def test_a_body_that_is_no_json_by_its_own_word_is_415(tiny_byte_level: Path) -> None:
    with serving(FormulaEngine(tiny_byte_level)) as url:
        body = json.dumps(QUESTION).encode()
        for kind, expected in (("text/plain", 415), ("", 415), ("Application/JSON; charset=utf-8", 200)):
            answer = httpx.post(f"{url}/v1/score", content=body, headers={"content-type": kind})
            assert answer.status_code == expected


# --- meters and log ---


def sample(service: Service, name: str) -> float | None:
    labels = dict(re.findall(r'(\w+)="([^"]*)"', name))
    return service.registry.get_sample_value(f"tutelage_{name.partition('{')[0]}", labels)


def test_meters_say_what_was_answered_refused_and_cut_short(tiny_byte_level: Path) -> None:
    engine = FormulaEngine(tiny_byte_level)
    service = Service(engine)
    with running(TeacherServer(service, key_guard(Keys(["k"])))) as port:
        http = httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"authorization": "Bearer k"})
        answer = http.post("/v1/score", json={"sequences": [[1, 2, 3], [4, 5]], "starts": [1, 1], "top_k": 4})
        http.post("/v1/score", json={**QUESTION, "top_k": 65})
        http.post("/v1/score", json=QUESTION, headers={"authorization": "Bearer wrong"})
        http.get("/ready")
        engine.open.clear()
        http.post("/v1/score", json=QUESTION, headers={TIMEOUT_HEADER: "1"})
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
    assert found["tutelage_sent_bytes_total",] == len(answer.content)
    assert found["tutelage_engine_ready",] == 1
    assert found["tutelage_teacher_info", card.engine, card.fingerprint, card.model] == 1
    assert found["process_resident_memory_bytes",] > 0


def test_services_of_one_process_count_apart_unless_they_share_a_registry(tiny_byte_level: Path) -> None:
    async def ask(service: Service) -> None:
        async for _ in service.answer(ScoreRequest.model_validate(QUESTION)):
            pass

    one, two = (Service(FormulaEngine(tiny_byte_level)) for _ in range(2))
    shared = CollectorRegistry()
    three, four = (Service(FormulaEngine(tiny_byte_level), registry=shared) for _ in range(2))
    for service in (one, three, four):
        asyncio.run(ask(service))
    assert [sample(s, "sequences_scored_total") for s in (one, two, three, four)] == [1, 0, 2, 2]


def test_the_request_log_says_how_each_request_ended_and_nothing_of_its_content(
    tiny_byte_level: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(FormulaEngine(tiny_byte_level), key="secret-key") as url:
        with caplog.at_level(logging.INFO, "tutelage.requests"):
            for question, key in (
                ({**QUESTION, "sequences": [[271, 272, 273]]}, "secret-key"),
                (QUESTION, "wrong-key"),
            ):
                answer = httpx.post(f"{url}/v1/score", json=question, headers={"authorization": f"Bearer {key}"})
            httpx.get(f"{url}/v1/teacher/tokenizer/x%0Ay", headers={"authorization": "Bearer secret-key"})
    lines = [json.loads(r.message) for r in caplog.records if r.name == "tutelage.requests"]
    assert [(li["what"], li["status"], li["outcome"]) for li in lines] == [
        ("POST /v1/score", 200, "answered"),
        ("POST /v1/score", 401, "unauthorized"),
        ("GET /v1/teacher/tokenizer/{name}", 404, "no_such_file"),
    ]
    assert (lines[0]["sequences"], lines[0]["tokens"], lines[0]["top_k"]) == (1, 3, 4)
    assert lines[0]["bytes"] > 100
    assert lines[0]["peer"].startswith("127.0.0.1:")
    assert lines[1]["id"] == answer.headers["tutelage-request"]
    assert not re.search(r"\b27[123]\b|key", caplog.text)


def test_a_handle_that_is_no_http_is_metered_too(tiny_byte_level: Path) -> None:
    async def ask() -> None:
        service = Service(FormulaEngine(tiny_byte_level))
        with pytest.raises(Refusal, match="at most 64"):
            service.answer(ScoreRequest.model_validate({**QUESTION, "top_k": 65}))
        chunks = service.answer(ScoreRequest.model_validate(QUESTION))
        await anext(chunks)
        await chunks.aclose()
        assert sample(service, 'rejected_total{reason="k_too_large"}') == 1
        assert sample(service, 'aborted_total{reason="client_gone"}') == 1

    asyncio.run(ask())
