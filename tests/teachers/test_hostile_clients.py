"""Clients that attack a server: trailers, bodies, unread responses, floods, and web pages on this machine."""

import asyncio
import json
import shutil
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from teachers.protocol.messages import ScoreRequest
from teachers.protocol.rows import Rows
from teachers.server import connections
from teachers.server.admission import MAX_DETAIL_CHARS, Rejection
from teachers.server.bodies import decode_request
from teachers.server.limits import Limits
from teachers.server.process import TeacherServer
from teachers.server.service import Service
from teachers.server.shares import WAITING_S, FairShares
from tests.serve import FormulaEngine, running, serving, until

pytestmark = pytest.mark.slow

REQUEST = {"sequences": [[1, 2, 3]], "starts": [1], "top_k": 4}
JSON_HEAD = b"POST %s HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
CHUNKED = b"transfer-encoding: chunked\r\n\r\n"


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def await_that(condition: object, limit_s: float = 20.0) -> None:
    until = time.monotonic() + limit_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < until
        time.sleep(0.01)


# --- bytes outside a body ---


def sent_before_the_end(sock: socket.socket, piece: bytes, most_bytes: int) -> int:
    """Send pieces until the server closes the connection. Returns the bytes that were sent."""
    sent = 0
    with suppress(ConnectionError):
        while sent < most_bytes:
            sock.sendall(piece)
            sent += len(piece)
            time.sleep(0.001)
    return sent


@pytest.mark.parametrize("path", [b"/v1/score", b"/health", b"/nowhere"])
@pytest.mark.parametrize(
    ("begin", "piece"),
    [
        (b"2\r\n{}\r\n0\r\n", b"a: b\r\n" * 1000),
        (b"2\r\n{}\r\n0\r\na: ", b"b" * 6000),
        (b"2;", b"x" * 6000),
        (b"0" * 6000, b"0" * 6000),
    ],
    ids=["trailers", "one-trailer", "chunk-extension", "chunk-size"],
)
def test_endless_bytes_besides_the_body_close_the_connection(
    tiny_byte_level: Path, path: bytes, begin: bytes, piece: bytes
) -> None:
    with serving(FormulaEngine(tiny_byte_level), key="k") as url, connect(url) as sock:
        sock.sendall(JSON_HEAD % path + CHUNKED + begin)
        assert sent_before_the_end(sock, piece, 1 << 20) < 10 * connections.MAX_HEAD_BYTES


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (JSON_HEAD % b"/v1/score" + CHUNKED, b"ffff\r\n" + b" " * 0xFFFF + b"\r\n"),
        (JSON_HEAD % b"/nowhere" + b"content-length: 999999999\r\n\r\n", b" " * 60_000),
        (JSON_HEAD % b"/v1/score" + b"content-length: 9\r\n\r\n", b"GET /metrics HTTP/1.1\r\n\r\n" * 2000),
    ],
    ids=["body-without-key", "body-without-route", "pipelined-requests"],
)
def test_endless_unread_bytes_close_the_connection(tiny_byte_level: Path, head: bytes, piece: bytes) -> None:
    with serving(FormulaEngine(tiny_byte_level), key="k") as url, connect(url) as sock:
        sock.sendall(head)
        assert sent_before_the_end(sock, piece, 64 << 20) < 32 << 20


def test_a_large_body_with_a_wrong_key_is_401(tiny_byte_level: Path) -> None:
    with serving(FormulaEngine(tiny_byte_level), key="k") as url:
        assert post(url, b" " * 1_000_000).status_code == 401


def test_large_bodies_and_small_chunks_and_short_trailers_are_accepted(tiny_byte_level: Path) -> None:
    body = json.dumps(REQUEST).encode().ljust(60_000)
    chunks = b"".join(b"2\r\n" + body[i : i + 2] + b"\r\n" for i in range(0, len(body), 2))
    whole = JSON_HEAD % b"/v1/score" + b"content-length: 60000\r\n\r\n" + body
    with serving(FormulaEngine(tiny_byte_level)) as url, connect(url) as sock:
        for _ in range(2):
            sock.sendall(whole + JSON_HEAD % b"/v1/score" + CHUNKED + chunks + b"0\r\nchecksum: 7\r\n\r\n")
        sock.sendall(JSON_HEAD % b"/nowhere" + b"connection: close\r\ncontent-length: 0\r\n\r\n")
        received = b""
        while data := sock.recv(1 << 16):
            received += data
    assert received.count(b"HTTP/1.1 200") == 4
    assert received.count(b"HTTP/1.1 404") == 1


# --- bodies ---


@pytest.mark.parametrize("value", ["true", '"6"', "6.0", "1e2", "null", "-1", "[6]", "NaN"])
def test_only_integers_are_ids(value: str) -> None:
    for name in ("sequences.0.1", "starts.0", "top_k", "chosen.0.0.0"):
        fields = {"sequences": "[[5,6,7]]", "starts": "[1]", "top_k": "4", "chosen": "[[[5],[5]]]"}
        field, _, place = name.partition(".")
        fields[field] = {"0.1": f"[[5,{value},7]]", "0": f"[{value}]", "": value, "0.0.0": f"[[[{value}],[5]]]"}[place]
        body = "{" + ",".join(f'"{key}":{text}' for key, text in fields.items()) + "}"
        with pytest.raises(
            Rejection, match="^body: JSON is malformed" if value == "NaN" else f"^{name}: Expected `int`"
        ):
            decode_request(body.encode(), Limits())


INTEGERS = st.integers(-1, 9) | st.integers(2**31, 2**70)
ANY = st.none() | st.booleans() | st.floats() | st.text(max_size=3) | INTEGERS
NESTED = st.recursive(ANY, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner))
FIELDS = {
    "sequences": st.lists(st.lists(INTEGERS, max_size=3), max_size=3) | NESTED,
    "starts": st.lists(INTEGERS, max_size=3) | NESTED,
    "top_k": INTEGERS | NESTED,
}
OPTIONAL = {"chosen": st.lists(st.lists(st.lists(INTEGERS, max_size=2), max_size=2), max_size=2) | NESTED, "x": NESTED}


@given(st.fixed_dictionaries(FIELDS, optional=OPTIONAL) | NESTED)
def test_a_body_is_accepted_exactly_if_the_documented_schema_accepts_it(value: object) -> None:
    body = json.dumps(value)
    try:
        expected = ScoreRequest.model_validate_json(body, strict=True)
    except ValidationError:
        with pytest.raises(Rejection) as rejected:
            decode_request(body.encode(), Limits())
        assert rejected.value.problem.status == 422
    else:
        assert decode_request(body.encode(), Limits()) == expected


@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_a_request_or_a_rejection(body: bytes) -> None:
    for each in (body, b'{"' + body + b'":1}', b'{"sequences":[[' + body):
        with pytest.raises(Rejection):
            decode_request(each, Limits())


@pytest.mark.parametrize("deep", [b"[" * 60_000, b'{"x":' * 60_000, b'{"sequences":' + b"[" * 60_000])
def test_deep_nesting_is_malformed(deep: bytes) -> None:
    with pytest.raises(Rejection) as rejected:
        decode_request(deep, Limits())
    assert rejected.value.problem.status == 422


HOSTILE = {
    "wrong types": b'{"sequences":[' + b",".join([b"-1"] * 340_000) + b'],"starts":[1],"top_k":1}',
    "wrong ids": b'{"sequences":[[' + b",".join([b"-1"] * 340_000) + b']],"starts":[1],"top_k":1}',
    "empty lists": b'{"sequences":[' + b",".join([b"[]"] * 340_000) + b'],"starts":[1],"top_k":1}',
    "many lists": b'{"chosen":[' + b",".join([b"[]"] * 65_000) + b'],"sequences":[[1,2]],"starts":[1],"top_k":1}',
    "long name": b'{"' + b"x" * 1_000_000 + b'":1}',
    "long number": b'{"top_k":' + b"9" * 1_000_000 + b"}",
    "many ids": b'{"sequences":[[' + b",".join([b"9"] * 500_000) + b']],"starts":[1],"top_k":1}',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_body_costs_little_time(name: str) -> None:
    began = time.thread_time()
    with suppress(Rejection):
        decode_request(HOSTILE[name], Limits())
    assert time.thread_time() - began < 0.2


def test_hostile_bodies_do_not_stop_the_event_loop(tiny_byte_level: Path) -> None:
    def send(body: bytes) -> bytes:
        with connect(url) as sock:
            head = b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
            sock.sendall(JSON_HEAD % b"/v1/score" + head + body)
            return b"".join(iter(lambda: sock.recv(1 << 16), b""))

    with serving(FormulaEngine(tiny_byte_level)) as url, httpx.Client() as http, ThreadPoolExecutor(21) as others:
        assert http.get(f"{url}/health").status_code == 200
        responses = [others.submit(send, HOSTILE[name]) for name in list(HOSTILE) * 3]
        slowest = 0.0
        while not all(response.done() for response in responses):
            began = time.monotonic()
            assert http.get(f"{url}/health").status_code == 200
            slowest = max(slowest, time.monotonic() - began)
    assert slowest < 3.0, "0.1 s on an idle machine; 20 s if the event loop decodes"
    for response in responses:
        head, _, body = response.result().partition(b"\r\n\r\n")
        assert head.startswith((b"HTTP/1.1 413", b"HTTP/1.1 422"))
        assert len(json.loads(body)["detail"]) <= MAX_DETAIL_CHARS + 1


def post(url: str, body: bytes, **headers: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/score", content=body, headers={"content-type": "application/json", **headers})


# --- unread responses ---


@pytest.mark.slow
def test_rows_that_clients_do_not_take_are_limited(tiny_byte_level: Path) -> None:
    engine = FormulaEngine(tiny_byte_level, max_tokens=4096)
    limit = 24 << 20
    service = Service(engine, Limits(max_held_bytes=limit))
    body = json.dumps({"sequences": [[1] * 4096] * 8, "starts": [1] * 8, "top_k": 64}).encode()  # rows of 17 MB
    head = JSON_HEAD % b"/v1/score" + b"content-length: %d\r\n\r\n" % len(body)
    most = 0
    with running(TeacherServer(service)) as port, ExitStack() as stack:
        url = f"http://127.0.0.1:{port}"
        for _ in range(4):
            stack.enter_context(connect(url)).sendall(head + body)
        while not (engine.finished == 32 and service.queued_tokens == 0):
            most = max(most, sum(stream.held_bytes for stream in list(service._streams)))
            time.sleep(0.01)
        await_that(lambda: len(service._streams) == 1)
        assert service.registry.get_sample_value("tutelage_aborted_total", {"reason": "not_taken"}) == 3
        assert post(url, json.dumps(REQUEST).encode()).content.endswith(b"\xff\xff\xff\xff\x00\x00\x00\x00")
    assert most <= limit


def test_the_client_that_holds_most_rows_loses_its_response(tiny_byte_level: Path) -> None:
    async def run() -> None:
        service = Service(FormulaEngine(tiny_byte_level), Limits(max_held_bytes=300_000))
        one = ScoreRequest(sequences=[[1] * 200], starts=[1], top_k=64)  # rows of 103 kB
        records = [service.new_record(peer, "score") for peer in ("a:1", "a:2", "b:1", "b:2")]
        slow, other = (service.score(one, None, record) for record in records[:2])
        await asyncio.sleep(0.2)
        assert slow.held_bytes == other.held_bytes > 100_000
        late = [service.score(one, None, record) for record in records[2:]]
        await asyncio.sleep(0.2)
        assert [bool(stream.held_bytes) for stream in (slow, other)].count(False) == 1, "one response of client a"
        assert sum(stream.held_bytes for stream in (slow, other, *late)) > 200_000
        [aborted] = [stream for stream in (slow, other) if not stream.held_bytes]
        assert [chunk async for chunk in aborted] == []
        for stream in (slow, other, *late):
            await stream.aclose()
        assert service.idle

    asyncio.run(run())


# --- fair shares ---


def test_a_client_alone_takes_everything_and_leaves_a_share_to_others() -> None:
    now = 0.0
    shares = FairShares(100, lambda: now)
    assert shares.excess("a", 100) == 0
    shares.take("a", 100)
    assert shares.excess("b", 10) == 10
    shares.release("a", 20)
    assert shares.excess("a", 10) == 40, "b waits, so the share of a is 50"
    assert shares.excess("b", 10) == 0
    shares.take("b", 10)
    shares.release("a", 40)
    assert shares.excess("a", 10) == 0, "within its share"
    assert shares.excess("b", 60) == 20, "the share of b is 50 too"
    now = WAITING_S + 1
    assert shares.excess("a", 50) == 0, "no client has waited recently"
    shares.release("a", 40)
    shares.release("b", 10)
    assert (shares.taken, shares.taken_by("a")) == (0, 0)


def test_a_flood_does_not_keep_another_client_waiting(tiny_byte_level: Path) -> None:
    """One client repeats 30 concurrent requests to a queue of 10 sequences; another client sends one at a time."""
    request = ScoreRequest(sequences=[[1] * 100], starts=[1], top_k=4)

    async def answered(service: Service, peer: str) -> None:
        while True:
            try:
                stream = service.score(request, None, service.new_record(peer, "score"))
            except Rejection:
                await asyncio.sleep(0.002)
            else:
                assert [chunk async for chunk in stream]
                return

    async def flood(service: Service) -> None:
        while True:
            await answered(service, "flood:1")

    async def run() -> list[int]:
        engine, one_at_a_time = FormulaEngine(tiny_byte_level, delay_s=0.005), asyncio.Lock()
        score = engine.score

        async def work(*arguments: Any) -> Rows:
            async with one_at_a_time:
                return await score(*arguments)

        engine.score = work  # type: ignore[method-assign, assignment]
        service = Service(engine, Limits(max_queued_tokens=1000))
        floods = [asyncio.create_task(flood(service)) for _ in range(30)]
        await until(lambda: service.queued_tokens == 1000)
        waits = []
        for _ in range(5):
            before = engine.finished
            await answered(service, "other:1")
            waits.append(engine.finished - before)
        for task in floods:
            task.cancel()
        await asyncio.gather(*floods, return_exceptions=True)
        return waits

    waits = asyncio.run(run())
    assert max(waits) <= 15, "sequences of the flood that are scored before an answer; at most a queue and a retry"


def test_clients_are_their_addresses_without_several_keys(tiny_byte_level: Path) -> None:
    engine = FormulaEngine(tiny_byte_level)
    engine.open.clear()
    body = json.dumps({"sequences": [[1] * 100], "starts": [1], "top_k": 4}).encode()
    with serving(engine, limits=Limits(max_queued_tokens=400)) as url, ThreadPoolExecutor(4) as threads:

        def send(address: str) -> httpx.Response:
            with httpx.Client(transport=httpx.HTTPTransport(local_address=address), timeout=20) as http:
                return http.post(f"{url}/v1/score", content=body, headers={"content-type": "application/json"})

        waiting = [threads.submit(send, "127.0.0.1") for _ in range(3)]
        await_that(lambda: engine.num_requests == 3)
        waiting.append(threads.submit(send, "127.0.0.1"))
        await_that(lambda: engine.num_requests == 4)
        refused = send("127.0.0.2")
        assert refused.json()["detail"] == "400 of 400 tokens are queued: retry later"
        again = send("127.0.0.1")
        assert again.status_code == 503
        engine.open.set()
        assert {response.result().status_code for response in waiting} == {200}
        assert send("127.0.0.2").status_code == 200


# --- static responses ---


def test_answers_remain_those_of_the_start(tiny_byte_level: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_byte_level, tmp_path / "model")
    data = (folder / "tokenizer.json").read_bytes()
    with serving(FormulaEngine(folder)) as url:
        paths = ("/v1/teacher", "/v1/teacher/tokenizer", "/v1/teacher/tokenizer/tokenizer.json")
        before = [httpx.get(url + path) for path in paths]
        (folder / "tokenizer.json").write_bytes(b"changed")
        after = [httpx.get(url + path) for path in paths]
    assert [response.content for response in before] == [response.content for response in after]
    assert after[2].content == data
    assert after[2].headers["etag"] == f'"{after[1].json()[0]["sha256"]}"'


# --- web pages ---


@pytest.fixture(scope="module")
def open_teacher(tiny_byte_level: Path) -> Iterator[str]:
    with serving(FormulaEngine(tiny_byte_level)) as url:
        yield url


PATHS = ("/health", "/metrics", "/ready", "/openapi.json", "/v1/teacher", "/v1/teacher/tokenizer", "/v1/nowhere", "/")
FOREIGN = ["x", "attacker.example", "10.0.0.1", "127.0.0.1.attacker.example", "localhost.attacker.example:80", ""]
FOREIGN += ["[::2]:80", "localhost:80:80", "localhost@attacker.example", "0.0.0.0", "2130706433", "[localhost"]


@pytest.mark.parametrize("host", FOREIGN)
def test_a_foreign_host_is_rejected_everywhere_on_loopback(open_teacher: str, host: str) -> None:
    with httpx.Client(base_url=open_teacher, headers={"host": host}) as http:
        for path in PATHS:
            response = http.get(path)
            assert response.status_code == 421
            assert response.json()["detail"].endswith("or start the teacher with a key")
            assert response.headers["connection"] == "close"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8101", "127.0.0.1", "127.8.9.1:1", "[::1]", "[::1]:8101"])
def test_names_of_loopback_are_accepted(open_teacher: str, host: str) -> None:
    assert httpx.get(f"{open_teacher}/v1/teacher", headers={"host": host}).status_code == 200
    same_origin = {"host": host, "origin": f"http://{host.lower()}"}
    assert httpx.get(f"{open_teacher}/v1/teacher", headers=same_origin).status_code == 200


@pytest.mark.parametrize(
    "head", [b"GET /health HTTP/1.0\r\n", b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\nhost: x\r\n"]
)
def test_none_and_two_hosts_are_rejected(open_teacher: str, head: bytes) -> None:
    with connect(open_teacher) as sock:
        sock.sendall(head + b"\r\n")
        assert sock.recv(4096).startswith(b"HTTP/1.1 421")


@pytest.mark.parametrize("origin", ["https://attacker.example", "null", "http://localhost:1", "https://127.0.0.1"])
def test_a_foreign_origin_is_rejected_everywhere_on_loopback(open_teacher: str, origin: str) -> None:
    with httpx.Client(base_url=open_teacher, headers={"origin": origin}) as http:
        for path in PATHS:
            response = http.get(path)
            assert response.status_code == 403
            assert "serves no web pages" in response.json()["detail"]
        assert http.post("/v1/score", json=REQUEST).status_code == 403


def test_requests_without_a_content_type_are_rejected(tiny_byte_level: Path, open_teacher: str) -> None:
    body = json.dumps(REQUEST).encode()
    assert httpx.post(f"{open_teacher}/v1/score", content=body).status_code == 415
    with serving(FormulaEngine(tiny_byte_level), key="k") as url:
        assert httpx.post(f"{url}/v1/score", content=body).status_code == 401
        headers = {"authorization": "Bearer k", "host": "teacher.example", "origin": "https://teacher.example"}
        assert httpx.post(f"{url}/v1/score", content=body, headers=headers).status_code == 415
        assert httpx.post(f"{url}/v1/score", json=REQUEST, headers=headers).status_code == 200


def test_nothing_redirects(tiny_byte_level: Path, open_teacher: str) -> None:
    with serving(FormulaEngine(tiny_byte_level), key="k") as url, httpx.Client() as http:
        for address in (url, open_teacher):
            for path in ("/v1/teacher/", "/health/", "/v1/teacher/tokenizer/", "/v1/score/", "//attacker.example/"):
                for method in ("GET", "POST"):
                    response = http.request(method, address + path)
                    assert response.status_code in (401, 404, 405), path
                    assert "location" not in response.headers
