"""Server and client over loopback: the contract, its limits, its errors."""

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

import teachers.errors as errors
from teachers.asking.client import TeacherClient
from teachers.keys import key_from_file
from teachers.limits import Limits
from teachers.protocol import TIMEOUT_HEADER, ScoreRequest
from tests.rows import random_rows
from tests.serve import FormulaEngine, free_port, saying, serving, until

T = TypeVar("T")


def call(url: str, do: Callable[[TeacherClient], Awaitable[T]], key: str | None = None) -> T:
    async def run() -> T:
        client = TeacherClient("gemma", url, key)
        try:
            return await do(client)
        finally:
            await client.aclose()

    return asyncio.run(run())


async def ask(client: TeacherClient, *lengths: int, top_k: int = 8, timeout_s: float = 20.0) -> list[object]:
    card = await client.card()
    request = ScoreRequest(sequences=[list(range(n)) for n in lengths], starts=[1] * len(lengths), top_k=top_k)
    return list(await client.score(request, card, timeout_s))


def test_rows_come_back_in_the_order_of_the_question(tiny_byte_level: Path) -> None:
    engine = FormulaEngine(tiny_byte_level)
    with serving(engine) as url:
        rows = call(url, lambda c: ask(c, 20, 5, 50))
    for length, got in zip((20, 5, 50), rows, strict=True):
        sent = random_rows(np.arange(length), engine.card.vocab_size, 8, seed=length, start=1)
        np.testing.assert_array_equal(got.ids, sent.ids)  # type: ignore[attr-defined]


def test_tokenizer_files_are_those_of_the_card(tiny_byte_level: Path) -> None:
    with serving(FormulaEngine(tiny_byte_level)) as url:
        files = call(url, lambda c: _files(c))
        etag = httpx.get(f"{url}/v1/teacher/tokenizer/tokenizer.json").headers["etag"]
    assert files["tokenizer.json"] == (tiny_byte_level / "tokenizer.json").read_bytes()
    assert etag


async def _files(client: TeacherClient) -> dict[str, bytes]:
    return await client.tokenizer_files(await client.card())


def test_another_tokenizer_than_the_card_says_is_refused(tiny_byte_level: Path) -> None:
    with serving(FormulaEngine(tiny_byte_level, tokenizer_sha256="0" * 64)) as url:
        with pytest.raises(errors.FingerprintMismatch, match="teacher gemma at .* another tokenizer than its card"):
            call(url, _files)


def test_only_listed_files_are_handed_out(tiny_byte_level: Path) -> None:
    with serving(FormulaEngine(tiny_byte_level)) as url:
        for name in ("config.json", "..%2Fconfig.json", "model.safetensors"):
            assert httpx.get(f"{url}/v1/teacher/tokenizer/{name}").status_code == 404


@pytest.mark.parametrize("key", [None, "wrong", "schlüssel"])
def test_a_wrong_key_is_refused_everywhere_but_at_health(tiny_byte_level: Path, key: str | None) -> None:
    with serving(FormulaEngine(tiny_byte_level), key="right") as url:
        headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
        for path in ("/v1/teacher", "/v1/teacher/tokenizer", "/v1/teacher/tokenizer/tokenizer.json"):
            assert httpx.get(url + path, headers=headers).status_code == 401
        answer = httpx.post(f"{url}/v1/score", json={}, headers=headers)
        assert answer.status_code == 401
        assert answer.headers["content-type"] == "application/problem+json"
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.get(f"{url}/ready").status_code == 200
        assert call(url, lambda c: ask(c, 5), key="right")
        if key is None or key.isascii():  # others are refused where keys are read
            with pytest.raises(errors.Unauthorized, match="teacher gemma at"):
                call(url, lambda c: c.card(), key=key)


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"sequences": [[1, 2]], "starts": [1], "top_k": 65}, 422, "at most 64"),
        (
            {"sequences": [[1, 2]], "starts": [1], "top_k": 4, "chosen": [[[5]]]},
            422,
            "formula scores no chosen ids: leave chosen out",
        ),
        ({"sequences": [[1, 2]], "starts": [1], "top_k": 0}, 422, "top_k"),
        ({"sequences": [[1, 2]], "starts": [], "top_k": 4}, 422, "one start per sequence"),
        ({"sequences": [], "starts": [], "top_k": 4}, 422, "one start per sequence"),
        ({"sequences": [[]], "starts": [1], "top_k": 4}, 422, "no position"),
        ({"sequences": [[1]], "starts": [1], "top_k": 4}, 422, "no position"),
        ({"sequences": [[1, 2]], "starts": [2], "top_k": 4}, 422, "no position"),
        ({"sequences": [[1, 10**6]], "starts": [1], "top_k": 4}, 422, "vocabulary ends at"),
        ({"sequences": [[1, -1]], "starts": [1], "top_k": 4}, 422, "sequences.0.1"),
        ({"sequences": [[1] * 513], "starts": [1], "top_k": 4}, 422, "at most 512"),
        ({"sequences": [[1, 2]] * 5, "starts": [1] * 5, "top_k": 4}, 413, "at most 4"),
        ({"sequences": [[1] * 400] * 3, "starts": [1] * 3, "top_k": 4}, 413, "at most 1000"),
        ({"sequences": [[1, 2]], "starts": [1], "top_k": 4, "extra": 1}, 422, "extra"),
        ("no json", 422, "body"),
        ("x" * 20_000, 413, "over 10000 bytes"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_one_sentence(
    tiny_byte_level: Path, body: object, status: int, says: str
) -> None:
    limits = Limits(max_sequences=4, max_request_tokens=1000, max_body_bytes=10_000)
    with serving(FormulaEngine(tiny_byte_level), limits=limits) as url:
        if isinstance(body, str):
            answer = httpx.post(f"{url}/v1/score", content=body)
        else:
            answer = httpx.post(f"{url}/v1/score", json=body)
    assert answer.status_code == status
    assert says in answer.json()["detail"]
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_full_queue_is_503_with_retry_after(tiny_byte_level: Path) -> None:
    engine = FormulaEngine(tiny_byte_level)
    engine.open.clear()
    with serving(engine, limits=Limits(max_queued_tokens=150)) as url:

        async def two(client: TeacherClient) -> tuple[list[object], BaseException]:
            first = asyncio.create_task(ask(client, 100))
            await until(lambda: engine.asked == 1)
            with pytest.raises(errors.Overloaded) as refused:
                await ask(client, 100)
            engine.open.set()
            return await first, refused.value

        rows, refused = call(url, two)
    assert rows
    assert isinstance(refused, errors.Overloaded)
    assert refused.retry_after_s is not None
    assert refused.retry_after_s >= 1.0


def test_a_client_that_goes_away_has_its_work_dropped(tiny_byte_level: Path) -> None:
    engine = FormulaEngine(tiny_byte_level)
    engine.open.clear()

    async def leave(client: TeacherClient) -> None:
        asking = asyncio.create_task(ask(client, 10, 20))
        await until(lambda: engine.asked == 2)
        asking.cancel()
        await until(lambda: engine.dropped == 2)

    with serving(engine) as url:
        call(url, leave)
        with pytest.raises(errors.Unavailable, match="no complete answer within 0.3 s"):
            call(url, lambda c: ask(c, 10, 20, timeout_s=0.3))


def test_a_deadline_that_passes_ends_the_work_without_a_client_that_leaves(
    tiny_byte_level: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FormulaEngine(tiny_byte_level)
    engine.open.clear()
    body = {"sequences": [[1, 2]], "starts": [1], "top_k": 4}
    with serving(engine) as url, caplog.at_level(logging.CRITICAL):
        answer = httpx.post(f"{url}/v1/score", json=body, headers={TIMEOUT_HEADER: "1"})
        assert httpx.post(f"{url}/v1/score", json=body, headers={TIMEOUT_HEADER: "soon"}).status_code == 422
    assert engine.dropped == 1
    assert len(answer.content) < 1000


def test_an_engine_that_fails_in_the_middle_is_a_truncated_answer(
    tiny_byte_level: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FormulaEngine(tiny_byte_level)
    engine.alter = lambda rows: 1 / 0 if len(rows) == 29 else rows  # type: ignore[assignment,method-assign,return-value]
    with serving(engine) as url, caplog.at_level(logging.CRITICAL):
        with pytest.raises(errors.Truncated, match="of 2 sequences"):
            call(url, lambda c: ask(c, 10, 30))
        assert call(url, lambda c: ask(c, 10))


def test_a_busy_engine_is_ready(tiny_byte_level: Path) -> None:
    engine = FormulaEngine(tiny_byte_level)
    engine.open.clear()
    engine.check = lambda: engine.score([0, 0], 1, 1)  # type: ignore[assignment, return-value]

    async def ask_while_busy(client: TeacherClient) -> None:
        busy = asyncio.create_task(ask(client, 20))
        await until(lambda: engine.asked == 1)
        await client.ready()  # a check would wait for the engine, which is let go afterwards
        engine.open.set()
        await busy

    with serving(engine) as url:
        call(url, ask_while_busy)


def test_an_engine_that_does_not_answer_is_not_ready(tiny_byte_level: Path) -> None:
    engine = FormulaEngine(tiny_byte_level)

    async def broken() -> None:
        raise RuntimeError("dead")

    with serving(engine) as url:
        call(url, lambda c: c.ready())
        engine.check = broken  # type: ignore[method-assign]
        with pytest.raises(errors.Unavailable, match="RuntimeError"):
            call(url, lambda c: c.ready())


@pytest.mark.parametrize("content", ["schlüssel", "first\nschlüssel", "a b", "a\x00b"])
def test_a_key_that_no_header_can_carry_is_refused_where_it_is_read(tmp_path: Path, content: str) -> None:
    (tmp_path / "key").write_text(content, encoding="utf-8")
    with pytest.raises(errors.TeacherError, match="printable ASCII"):
        key_from_file(tmp_path / "key")


def test_a_client_that_never_reads_holds_no_place_in_the_queue(tiny_byte_level: Path) -> None:
    engine = FormulaEngine(tiny_byte_level)
    body = json.dumps({"sequences": [list(range(400))] * 40, "starts": [1] * 40, "top_k": 64}).encode()
    with serving(engine, limits=Limits(max_queued_tokens=20_000)) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as lazy:
            lazy.sendall(b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            asyncio.run(until(lambda: engine.finished == 40))
            assert call(url, lambda c: ask(c, *([400] * 40)))


def test_another_protocol_version_is_refused(tiny_byte_level: Path) -> None:
    with serving(FormulaEngine(tiny_byte_level, protocol="99")) as url:
        with pytest.raises(errors.VersionMismatch, match="expected protocol 1, received 99"):
            call(url, lambda c: c.card())


def head(length: int) -> bytes:
    return f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n".encode()


@pytest.mark.parametrize(
    ("answer", "error"),
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
def test_every_strange_server_is_an_error_of_ours(answer: bytes, error: type[errors.TeacherError]) -> None:
    with saying(answer) as url, pytest.raises(error, match="teacher gemma at http://127.0.0.1"):
        call(url, lambda c: c.card())


def test_nobody_there_is_unavailable() -> None:
    with pytest.raises(errors.Unavailable, match="nothing answers"):
        call(f"http://127.0.0.1:{free_port()}", lambda c: c.card())


def test_an_address_that_is_none_is_an_error_of_ours() -> None:
    for url in ("no-scheme:8101", "127.0.0.1:9", "http://", "ftp://127.0.0.1", "http://a:abc", "http://a:99999"):
        with pytest.raises(errors.TeacherError, match="teacher gemma: .* is no address"):
            call(url, lambda c: c.card())


HTTPX_ERRORS = [c for c in vars(httpx).values() if isinstance(c, type) and issubclass(c, Exception)]


@pytest.mark.parametrize("kind", HTTPX_ERRORS, ids=lambda kind: kind.__name__)
def test_every_httpx_error_is_mapped(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever httpx can raise on the way arrives as an error of ours, with the teacher's name."""
    if kind is httpx.CookieConflict:
        return  # no cookies are read
    error = kind.__new__(kind)
    error.args = ("from httpx",)

    def fail(*_: object, **__: object) -> None:
        raise error

    async def run(client: TeacherClient) -> None:
        monkeypatch.setattr(client._http._http, "stream", fail)
        await client.card()

    with pytest.raises(errors.TeacherError, match="teacher gemma at"):
        call("http://127.0.0.1:9", run)
