"""Server and client over loopback: protocol, limits and errors."""

import asyncio
import json
import logging
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import httpx
import numpy as np
import pytest

import teachers.protocol.errors as errors
from teachers.client.dialects.native import NativeClient
from teachers.keys import key_from_file
from teachers.protocol.messages import TIMEOUT_HEADER, ScoreRequest, TeacherCard
from teachers.server.limits import Limits
from tests.rows import random_rows
from tests.serve import FormulaEngine, free_port, responding, serving, until

T = TypeVar("T")
CARD = TeacherCard(
    model="m", fingerprint="a" * 64, engine="e", dtype="float32", vocab_size=300, tokenizer_sha256="b" * 64,
    bos_id=None, eos_id=None, expects_bos=False, max_tokens=100, max_top_k=64,
)  # fmt: skip


def call(url: str, do: Callable[[NativeClient], Awaitable[T]], key: str | None = None) -> T:
    async def run() -> T:
        client = NativeClient("gemma", url, key)
        try:
            return await do(client)
        finally:
            await client.aclose()

    return asyncio.run(run())


async def score(client: NativeClient, *lengths: int, top_k: int = 8, timeout_s: float = 20.0) -> list[object]:
    card = await client.card()
    request = ScoreRequest(sequences=[list(range(n)) for n in lengths], starts=[1] * len(lengths), top_k=top_k)
    return list(await client.score(request, card, timeout_s))


def test_rows_are_returned_in_the_order_of_the_request(tiny_byte_level: Path) -> None:
    engine = FormulaEngine(tiny_byte_level)
    with serving(engine) as url:
        rows = call(url, lambda c: score(c, 20, 5, 50))
    for length, got in zip((20, 5, 50), rows, strict=True):
        sent = random_rows(np.arange(length), engine.card.vocab_size, 8, seed=length, start=1)
        np.testing.assert_array_equal(got.ids, sent.ids)  # type: ignore[attr-defined]


def test_tokenizer_files_are_those_of_the_card(tiny_byte_level: Path) -> None:
    with serving(FormulaEngine(tiny_byte_level)) as url:
        files = call(url, lambda c: _files(c))
        etag = httpx.get(f"{url}/v1/teacher/tokenizer/tokenizer.json").headers["etag"]
    assert files["tokenizer.json"] == (tiny_byte_level / "tokenizer.json").read_bytes()
    assert etag


async def _files(client: NativeClient) -> dict[str, bytes]:
    return await client.tokenizer_files(await client.card())


def test_a_tokenizer_other_than_the_cards_is_rejected(tiny_byte_level: Path) -> None:
    with serving(FormulaEngine(tiny_byte_level, tokenizer_sha256="0" * 64)) as url:
        with pytest.raises(errors.FingerprintMismatch, match="teacher gemma at .* another tokenizer than its card"):
            call(url, _files)


def test_only_listed_files_are_provided(tiny_byte_level: Path) -> None:
    with serving(FormulaEngine(tiny_byte_level)) as url:
        for name in ("config.json", "..%2Fconfig.json", "model.safetensors"):
            assert httpx.get(f"{url}/v1/teacher/tokenizer/{name}").status_code == 404


@pytest.mark.parametrize("key", [None, "wrong", "schlüssel"])
def test_a_wrong_key_is_rejected_by_all_routes_under_v1(tiny_byte_level: Path, key: str | None) -> None:
    with serving(FormulaEngine(tiny_byte_level), key="right") as url:
        headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
        for path in ("/v1/teacher", "/v1/teacher/tokenizer", "/v1/teacher/tokenizer/tokenizer.json"):
            assert httpx.get(url + path, headers=headers).status_code == 401
        response = httpx.post(f"{url}/v1/score", json={}, headers=headers)
        assert response.status_code == 401
        assert response.headers["content-type"] == "application/problem+json"
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.get(f"{url}/ready").status_code == 200
        assert call(url, lambda c: score(c, 5), key="right")
        if key is None or key.isascii():  # other keys are rejected when they are read
            with pytest.raises(errors.Unauthorized, match="teacher gemma at"):
                call(url, lambda c: c.card(), key=key)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"sequences": [[1, 2]], "starts": [1], "top_k": 65}, 422, "at most 64"),
        (
            {"sequences": [[1, 2]], "starts": [1], "top_k": 4, "chosen": [[[5]]]},
            422,
            "formula scores no chosen ids: remove the field chosen",
        ),
        ({"sequences": [[1, 2]], "starts": [1], "top_k": 0}, 422, "top_k"),
        ({"sequences": [[1, 2]], "starts": [], "top_k": 4}, 422, "one start per sequence"),
        ({"sequences": [], "starts": [], "top_k": 4}, 422, "one start per sequence"),
        ({"sequences": [[]], "starts": [1], "top_k": 4}, 422, "no position"),
        ({"sequences": [[1]], "starts": [1], "top_k": 4}, 422, "no position"),
        ({"sequences": [[1, 2]], "starts": [2], "top_k": 4}, 422, "no position"),
        ({"sequences": [[1, 10**6]], "starts": [1], "top_k": 4}, 422, "the largest id of the vocabulary is"),
        ({"sequences": [[1, -1]], "starts": [1], "top_k": 4}, 422, "sequences.0.1"),
        ({"sequences": [[1] * 513], "starts": [1], "top_k": 4}, 422, "at most 512"),
        ({"sequences": [[1, 2]] * 5, "starts": [1] * 5, "top_k": 4}, 413, "at most 4"),
        ({"sequences": [[1] * 400] * 3, "starts": [1] * 3, "top_k": 4}, 413, "at most 1000"),
        ({"sequences": [[1, 2]], "starts": [1], "top_k": 4, "extra": 1}, 422, "extra"),
        ("no json", 422, "body"),
        ("x" * 20_000, 413, "over 10000 bytes"),
    ],
)
def test_an_invalid_request_is_rejected_with_one_sentence(
    tiny_byte_level: Path, body: object, status: int, message: str
) -> None:
    limits = Limits(max_sequences=4, max_request_tokens=1000, max_body_bytes=10_000)
    with serving(FormulaEngine(tiny_byte_level), limits=limits) as url:
        if isinstance(body, str):
            response = httpx.post(f"{url}/v1/score", content=body, headers={"content-type": "application/json"})
        else:
            response = httpx.post(f"{url}/v1/score", json=body)
    assert response.status_code == status
    assert message in response.json()["detail"]
    assert response.headers["content-type"] == "application/problem+json"


def test_a_full_queue_is_503_with_retry_after(tiny_byte_level: Path) -> None:
    engine = FormulaEngine(tiny_byte_level)
    engine.open.clear()
    with serving(engine, limits=Limits(max_queued_tokens=150)) as url:

        async def two(client: NativeClient) -> tuple[list[object], BaseException]:
            first = asyncio.create_task(score(client, 100))
            await until(lambda: engine.num_requests == 1)
            with pytest.raises(errors.Overloaded) as refused:
                await score(client, 100)
            engine.open.set()
            return await first, refused.value

        rows, refused = call(url, two)
    assert rows
    assert isinstance(refused, errors.Overloaded)
    assert refused.retry_after_s is not None
    assert refused.retry_after_s >= 1.0


def test_work_is_cancelled_when_the_client_disconnects(tiny_byte_level: Path) -> None:
    engine = FormulaEngine(tiny_byte_level)
    engine.open.clear()

    async def disconnect(client: NativeClient) -> None:
        pending = asyncio.create_task(score(client, 10, 20))
        await until(lambda: engine.num_requests == 2)
        pending.cancel()
        await until(lambda: engine.cancelled == 2)

    with serving(engine) as url:
        call(url, disconnect)
        with pytest.raises(errors.Unavailable, match="no complete response within 0.3 s"):
            call(url, lambda c: score(c, 10, 20, timeout_s=0.3))


def test_work_is_cancelled_at_its_deadline_while_the_client_stays_connected(
    tiny_byte_level: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FormulaEngine(tiny_byte_level)
    engine.open.clear()
    body = {"sequences": [[1, 2]], "starts": [1], "top_k": 4}
    with serving(engine) as url, caplog.at_level(logging.CRITICAL):
        response = httpx.post(f"{url}/v1/score", json=body, headers={TIMEOUT_HEADER: "1"})
        assert httpx.post(f"{url}/v1/score", json=body, headers={TIMEOUT_HEADER: "soon"}).status_code == 422
    assert engine.cancelled == 1
    assert len(response.content) < 1000


def test_a_failing_engine_truncates_the_response(tiny_byte_level: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = FormulaEngine(tiny_byte_level)
    engine.alter = lambda rows: 1 / 0 if len(rows) == 29 else rows  # type: ignore[assignment,method-assign,return-value]
    with serving(engine) as url, caplog.at_level(logging.CRITICAL):
        with pytest.raises(errors.Truncated, match="of 2 sequences"):
            call(url, lambda c: score(c, 10, 30))
        assert call(url, lambda c: score(c, 10))


def test_a_busy_engine_is_ready(tiny_byte_level: Path) -> None:
    engine = FormulaEngine(tiny_byte_level)
    engine.open.clear()
    engine.check = lambda: engine.score([0, 0], 1, 1)  # type: ignore[assignment, return-value]

    async def check_while_busy(client: NativeClient) -> None:
        busy = asyncio.create_task(score(client, 20))
        await until(lambda: engine.num_requests == 1)
        await client.ready()  # a check would wait for the engine, which is released afterwards
        engine.open.set()
        await busy

    with serving(engine) as url:
        call(url, check_while_busy)


def test_a_failing_engine_is_not_ready(tiny_byte_level: Path) -> None:
    engine = FormulaEngine(tiny_byte_level)

    async def broken() -> None:
        raise RuntimeError("dead")

    with serving(engine) as url:
        call(url, lambda c: c.ready())
        engine.check = broken  # type: ignore[method-assign]
        with pytest.raises(errors.Unavailable, match="RuntimeError"):
            call(url, lambda c: c.ready())


@pytest.mark.parametrize("content", ["schlüssel", "first\nschlüssel", "a b", "a\x00b"])
def test_a_key_that_is_invalid_in_a_header_is_rejected_when_it_is_read(tmp_path: Path, content: str) -> None:
    (tmp_path / "key").write_text(content, encoding="utf-8")
    with pytest.raises(errors.TeacherError, match="printable ASCII"):
        key_from_file(tmp_path / "key")


def test_a_client_that_never_reads_does_not_fill_the_queue(tiny_byte_level: Path) -> None:
    engine = FormulaEngine(tiny_byte_level)
    body = json.dumps({"sequences": [list(range(400))] * 40, "starts": [1] * 40, "top_k": 64}).encode()
    with serving(engine, limits=Limits(max_queued_tokens=20_000)) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as idle_client:
            head = b"POST /v1/score HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
            idle_client.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
            asyncio.run(until(lambda: engine.finished == 40))
            assert call(url, lambda c: score(c, *([400] * 40)))


def test_another_protocol_version_is_rejected(tiny_byte_level: Path) -> None:
    with serving(FormulaEngine(tiny_byte_level, protocol="99")) as url:
        with pytest.raises(errors.VersionMismatch, match="expected protocol 3, received 99"):
            call(url, lambda c: c.card())


def respond_with_card(**changes: object) -> bytes:
    card = CARD.model_dump() | changes
    data = json.dumps({name: value for name, value in card.items() if value is not Ellipsis}).encode()
    return head(len(data)) + data


def test_unknown_fields_of_a_card_are_ignored() -> None:
    with responding(respond_with_card(added_later={"a": [1]})) as url:
        assert call(url, lambda c: c.card()) == CARD
        call(url, lambda c: c.check(CARD, 5.0))


def test_missing_optional_fields_of_a_card_have_their_defaults() -> None:
    with responding(respond_with_card(max_chosen=..., revision=..., chat_template_sha256=...)) as url:
        assert call(url, lambda c: c.card()) == CARD


@pytest.mark.parametrize(
    "changes", [{"vocab_size": "many"}, {"model": ...}, {"added_later": 1}, {"max_tokens": ..., "engine": 7}]
)
def test_the_version_of_a_card_is_compared_before_its_other_fields(changes: dict[str, object]) -> None:
    with responding(respond_with_card(protocol="1", **changes)) as url:
        with pytest.raises(errors.VersionMismatch, match="teacher gemma at .*expected protocol 3, received 1"):
            call(url, lambda c: c.card())


def test_a_card_without_a_version_is_malformed() -> None:
    with responding(respond_with_card(protocol=...)) as url:
        with pytest.raises(errors.ProtocolError, match="protocol: Field required"):
            call(url, lambda c: c.card())


def head(length: int) -> bytes:
    return f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n".encode()


@pytest.mark.parametrize(
    ("response", "error"),
    [
        (b"", errors.Truncated),
        (head(100) + b"{}", errors.Truncated),
        (b"SSH-2.0-OpenSSH\r\n", errors.Truncated),
        (head(2) + b"{}", errors.ProtocolError),
        (head(8) + b"not json", errors.ProtocolError),
        (b"HTTP/1.1 500 Oops\r\ncontent-length: 0\r\n\r\n", errors.Unavailable),
        (b"HTTP/1.1 429 Slow\r\nretry-after: 7\r\ncontent-length: 0\r\n\r\n", errors.Overloaded),
        (b"HTTP/1.1 404 No\r\ncontent-length: 0\r\n\r\n", errors.Rejected),
        (b"HTTP/1.1 302 Go\r\nlocation: /\r\ncontent-length: 0\r\n\r\n", errors.ProtocolError),
    ],
)
def test_every_invalid_response_is_a_teacher_error(response: bytes, error: type[errors.TeacherError]) -> None:
    with responding(response) as url, pytest.raises(error, match="teacher gemma at http://127.0.0.1"):
        call(url, lambda c: c.card())


def test_a_closed_port_is_unavailable() -> None:
    with pytest.raises(errors.Unavailable, match="no response"):
        call(f"http://127.0.0.1:{free_port()}", lambda c: c.card())


def test_a_malformed_address_is_a_teacher_error() -> None:
    for url in ("no-scheme:8101", "127.0.0.1:9", "http://", "ftp://127.0.0.1", "http://a:abc", "http://a:99999"):
        with pytest.raises(errors.TeacherError, match="teacher gemma: .* is not an address"):
            call(url, lambda c: c.card())


HTTPX_ERRORS = [c for c in vars(httpx).values() if isinstance(c, type) and issubclass(c, Exception)]


@pytest.mark.parametrize("kind", HTTPX_ERRORS, ids=lambda kind: kind.__name__)
def test_every_httpx_error_is_mapped(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every error of httpx becomes a TeacherError with the teacher's name."""
    if kind is httpx.CookieConflict:
        return  # no cookies are read
    error = kind.__new__(kind)
    error.args = ("from httpx",)

    def fail(*_: object, **__: object) -> None:
        raise error

    async def run(client: NativeClient) -> None:
        monkeypatch.setattr(client._http._http, "stream", fail)
        await client.card()

    with pytest.raises(errors.TeacherError, match="teacher gemma at"):
        call("http://127.0.0.1:9", run)
