"""Hostile teachers: the client returns a correct value or raises one short sentence, within bounded memory.

A function changes the responses of a real teacher application.
"""

import asyncio
import gzip
import json
import logging
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from pydantic import ValidationError

import teachers.protocol.errors as errors
from alignment import Vocabulary
from teachers.client.addresses import TeacherAddress
from teachers.client.dialects.native import NativeClient, parse_card
from teachers.client.health import ReplicaHealth
from teachers.client.pool import TeacherPool
from teachers.protocol.messages import PROBLEM, ScoreRequest
from teachers.protocol.rows import Rows
from teachers.server.app import build_app
from teachers.server.service import Service
from tests.serve import FormulaEngine, serving, serving_app
from tests.teachers.test_hostile_messages import CONTROL, assert_one_short_sentence
from tests.teachers.test_protocol import CARD
from trainer.query.config import TeacherConfig
from trainer.query.connect import checked_vocabulary

pytestmark = pytest.mark.slow

T = TypeVar("T")
BOMB = gzip.compress(b"\0" * (64 << 20))
Headers = dict[str, str]
Attack = Callable[[str, int, Headers, bytes], tuple[int, Headers, bytes]]  # path, request number, honest response


@contextmanager
def attacking(engine: FormulaEngine, attack: Attack) -> Iterator[str]:
    """Serve the responses of an honest teacher, changed by `attack`. Yields the address."""
    honest = httpx.ASGITransport(build_app(Service(engine)))
    counts: dict[str, int] = {}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
        async with httpx.AsyncClient(transport=honest, base_url="http://honest") as http:
            headers = {name.decode(): value.decode() for name, value in scope["headers"]}
            received = await http.request(scope["method"], scope["path"], content=body, headers=headers)
        path = scope["path"]
        counts[path] = counts.get(path, 0) + 1
        sent = {"content-type": received.headers["content-type"]}
        status, sent, data = attack(path, counts[path], sent, received.content)
        pairs = [(name.encode(), value.encode("latin-1")) for name, value in sent.items()]
        await send({"type": "http.response.start", "status": status, "headers": pairs})
        await send({"type": "http.response.body", "body": data})

    with serving_app(app) as url:  # type: ignore[arg-type]
        yield url


def on(path: str, status: int = 200, body: bytes | None = None, **headers: str) -> Attack:
    """Return an attack on one route."""

    def attack(received: str, _: int, honest: Headers, data: bytes) -> tuple[int, Headers, bytes]:
        if received != path:
            return 200, honest, data
        changed = {name.replace("_", "-"): value for name, value in headers.items()}
        return status, honest | changed, data if body is None else body

    return attack


def with_card(**changes: object) -> Attack:
    def attack(path: str, _: int, headers: Headers, data: bytes) -> tuple[int, Headers, bytes]:
        return 200, headers, json.dumps(json.loads(data) | changes).encode() if path == "/v1/teacher" else data

    return attack


def call(url: str, do: Callable[[NativeClient], Awaitable[T]]) -> T:
    async def run() -> T:
        client = NativeClient("t", url)
        try:
            return await do(client)
        finally:
            await client.aclose()

    return asyncio.run(run())


async def connect_and_score(client: NativeClient) -> Rows:
    card = await client.card()
    await client.tokenizer_files(card)
    return (await client.score(ScoreRequest(sequences=[[1, 2, 3, 4]], starts=[1], top_k=4), card, 20.0))[0]


# --- errors and cards ---


@pytest.mark.parametrize("status", [400, 401, 404, 422, 429, 500, 503])
@pytest.mark.parametrize(
    "body",
    [
        json.dumps({"title": "x", "status": 500, "detail": CONTROL + "A" * 60_000}).encode(),
        json.dumps({"error": {"message": CONTROL + "A" * 60_000}}).encode(),
        b'{"error":' + b"[" * 20_000,
        b"\xff\xfe" * 1000,
    ],
)
def test_an_error_of_a_server_is_one_short_sentence(tiny_byte_level: Path, status: int, body: bytes) -> None:
    with attacking(FormulaEngine(tiny_byte_level), on("/v1/teacher", status, body, content_type=PROBLEM)) as url:
        with pytest.raises(errors.TeacherError) as caught:
            call(url, connect_and_score)
    assert_one_short_sentence(caught.value)


CARD_FAULTS: dict[str, dict[str, object]] = {
    "vocab_size": {"vocab_size": [0, -5, 2**40, 2**70, 1.5, 6.0, "300", True, None]},
    "max_tokens": {"max_tokens": [0, -7, 10**40, "9", 1.0]},
    "max_top_k": {"max_top_k": [0, -1, 301, 10**30]},
    "max_chosen": {"max_chosen": [-1, 2**40, "1"]},
    "bos_id": {"bos_id": [-3, 300, 2**80, "1", True]},
    "eos_id": {"eos_id": [-1, 300, 2**90]},
    "expects_bos": {"expects_bos": ["true", 1, None]},
    "fingerprint": {"fingerprint": ["e" * 63, "G" * 64, CONTROL, "a" * 100_000, 7]},
    "tokenizer_sha256": {"tokenizer_sha256": ["", "A" * 64, "b" * 64 + "\n"]},
}
CASES = [(field, value) for field, values in CARD_FAULTS.items() for value in values[field]]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("field", "value"), CASES, ids=lambda value: str(value)[:20])
def test_a_card_out_of_bounds_is_malformed_and_the_field_is_named(field: str, value: object) -> None:
    with pytest.raises(errors.ProtocolError, match=f"malformed card: .*{field}|malformed card: .*whole") as caught:
        parse_card(json.dumps(CARD.model_dump() | {field: value}).encode())
    assert_one_short_sentence(caught.value)
    assert field in str(caught.value)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"null", b"[" * 100_000, b"\xff", json.dumps({"protocol": "9" * 9999}).encode()]
)
def test_a_body_that_is_no_card_is_one_short_sentence(body: bytes) -> None:
    with pytest.raises(errors.ProtocolError) as caught:
        parse_card(body)
    assert_one_short_sentence(caught.value)


def test_a_vocabulary_that_the_tokenizer_cannot_explain_is_rejected(tiny_byte_level: Path) -> None:
    """Without the check, a table with an entry for every id would be allocated."""
    card = FormulaEngine(tiny_byte_level, vocab_size=1 << 22).card
    files = {"tokenizer.json": (tiny_byte_level / "tokenizer.json").read_bytes()}
    config = TeacherConfig(name="t", urls=["http://t"], top_k=4)
    num_ids = len(Vocabulary.from_files(files, name="t"))
    with pytest.raises(errors.ProtocolError, match=rf"vocabulary of 4194304 ids, its tokenizer has {num_ids}"):
        checked_vocabulary(config, card, files)
    padded = card.model_copy(update={"vocab_size": num_ids + 60_000})
    assert len(checked_vocabulary(config, padded, files)) == num_ids


def test_another_card_is_rejected_with_the_field_and_both_values(tiny_byte_level: Path) -> None:
    engine = FormulaEngine(tiny_byte_level)
    with attacking(engine, with_card(max_tokens=77)) as url:
        with pytest.raises(errors.FingerprintMismatch, match="expected max_tokens 512, received 77"):
            call(url, lambda client: client.check(engine.card, 5.0))


# --- HTTP ---


@pytest.mark.parametrize(
    "path", ["/v1/teacher", "/v1/teacher/tokenizer", "/v1/teacher/tokenizer/tokenizer.json", "/v1/score"]
)
@pytest.mark.parametrize("encoding", ["gzip", "gzip, gzip", "br", "deflate", "x"])
def test_an_encoded_response_is_rejected_before_it_is_decoded(tiny_byte_level: Path, path: str, encoding: str) -> None:
    with attacking(FormulaEngine(tiny_byte_level), on(path, body=BOMB, content_encoding=encoding)) as url:
        tracemalloc.start()
        with pytest.raises(errors.ProtocolError, match="without content encoding") as caught:
            call(url, connect_and_score)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert_one_short_sentence(caught.value)
    assert peak < 32 << 20


@pytest.mark.parametrize("path", ["/v1/teacher", "/v1/teacher/tokenizer", "/v1/score"])
@pytest.mark.parametrize("status", [200, 500])
def test_a_response_beyond_its_limit_is_rejected(tiny_byte_level: Path, path: str, status: int) -> None:
    with attacking(FormulaEngine(tiny_byte_level), on(path, status, b" " * (2 << 20))) as url:
        with pytest.raises(errors.ProtocolError, match="expected at most .* bytes"):
            call(url, connect_and_score)


def test_tokenizer_files_are_limited_together(tiny_byte_level: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teachers.client.dialects.native.MAX_FILES_BYTES", 1000)
    with (
        serving(FormulaEngine(tiny_byte_level)) as url,
        pytest.raises(errors.ProtocolError, match="at most 1000 bytes"),
    ):
        call(url, connect_and_score)


def test_a_listing_that_names_a_file_twice_is_rejected(tiny_byte_level: Path) -> None:
    body = json.dumps([{"name": "tokenizer.json", "sha256": "a" * 64}] * 20).encode()
    with attacking(FormulaEngine(tiny_byte_level), on("/v1/teacher/tokenizer", body=body)) as url:
        with pytest.raises(errors.ProtocolError, match="names tokenizer.json twice"):
            call(url, connect_and_score)


def test_files_with_other_names_are_never_requested(tiny_byte_level: Path) -> None:
    requested = []

    def attack(path: str, _: int, headers: Headers, data: bytes) -> tuple[int, Headers, bytes]:
        requested.append(path)
        if path == "/v1/teacher/tokenizer":
            more = [{"name": name, "sha256": "0" * 64} for name in ("../../etc/passwd", "tokenizer.json/../x", "a\n")]
            data = json.dumps([*json.loads(data), *more]).encode()
        return 200, headers, data

    with attacking(FormulaEngine(tiny_byte_level), attack) as url:
        call(url, connect_and_score)
    prefix = "/v1/teacher/tokenizer/"
    assert [path for path in requested if path.startswith(prefix)] == [prefix + "tokenizer.json"]


def test_no_cookie_is_kept_and_no_redirect_followed(tiny_byte_level: Path) -> None:
    async def both(client: NativeClient) -> None:
        for _ in range(3):
            await connect_and_score(client)
        assert not client._http._http.cookies.jar

    engine = FormulaEngine(tiny_byte_level)
    with attacking(engine, lambda _p, n, h, d: (200, h | {"set-cookie": f"c{n}={'x' * 900}; path=/"}, d)) as url:
        call(url, both)
    with serving(engine) as other, attacking(engine, on("/v1/teacher", 307, location=f"{other}/v1/teacher")) as url:
        with pytest.raises(errors.ProtocolError, match="expected status 200, received 307"):
            call(url, connect_and_score)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("7", 7.0), ("99999", 99999.0), ("9" * 400, None), ("\xb2", None), ("-1", None), ("1e9", None)],
)
def test_retry_after_is_a_number_without_sign_or_exponent(
    tiny_byte_level: Path, value: str, expected: float | None
) -> None:
    with attacking(FormulaEngine(tiny_byte_level), on("/v1/teacher", 503, b"{}", retry_after=value)) as url:
        with pytest.raises(errors.Overloaded) as caught:
            call(url, connect_and_score)
    assert caught.value.retry_after_s == expected


@pytest.mark.parametrize(
    "url",
    ["http://user:hunter2@host:1", "dns+http://user:hunter2@host", "user:hunter2@host:1", "http://u:hunter2/x@host"],
)
def test_a_password_in_an_address_is_rejected_and_never_repeated(url: str) -> None:
    async def connect() -> None:
        async with TeacherPool([TeacherAddress("t", (url,))]) as pool:
            await pool.connect("t")

    for attempt in (
        lambda: asyncio.run(connect()),
        lambda: NativeClient("t", url),
        lambda: TeacherConfig(name="t", urls=[url]),
    ):
        with pytest.raises((errors.TeacherError, ValidationError), match="key_file or key_env") as caught:
            attempt()
        assert "hunter2" not in str(caught.value)


# --- replicas ---


def rubbish(path: str, number: int, headers: Headers, data: bytes) -> tuple[int, Headers, bytes]:
    """Attack: the metadata of every score response are not UTF-8."""
    return 200, headers, data.replace(b"fingerprint", b"\xff\xfengerprint") if path == "/v1/score" else data


@pytest.mark.slow
@pytest.mark.parametrize(
    "attack", [rubbish, on("/v1/teacher", body=b"{"), with_card(vocab_size=-1)], ids=["score", "json", "card"]
)
def test_replicas_that_send_rubbish_are_quarantined_and_the_others_continue(
    tiny_byte_level: Path, attack: Attack
) -> None:
    engine = FormulaEngine(tiny_byte_level)

    async def run(urls: tuple[str, ...]) -> tuple[int, int]:
        async with TeacherPool([TeacherAddress("t", urls, concurrency=1)]) as pool:
            await pool.connect("t")
            await asyncio.gather(*(pool.score("t", [5, 6, 7, 8, 9 + i], 1, 8) for i in range(30)))
            stats = pool.stats()["t"]
            return stats.requests, stats.healthy

    with attacking(engine, attack) as one, attacking(engine, attack) as two, serving(engine) as good:
        assert asyncio.run(run((one, good, two))) == (30, 1)


@pytest.mark.slow
def test_a_trial_that_fails_unexpectedly_is_logged_and_repeated(
    tiny_byte_level: Path, caplog: pytest.LogCaptureFixture
) -> None:
    failures: list[str] = []

    async def run(url: str) -> None:
        async def make_client(address: str) -> NativeClient:
            client = NativeClient("t", address)
            check = client.check

            async def flaky(*arguments: Any) -> None:
                if len(failures) in (1, 2):
                    failures.append("trial")
                    raise ZeroDivisionError("a fault of this project")
                await check(*arguments)

            client.check = flaky  # type: ignore[method-assign, assignment]
            return client

        health = ReplicaHealth(TeacherAddress("t", (url,)), make_client, lambda _: None)
        try:
            await health.connect()
            failures.append("request")
            health.quarantine(health.replicas[0], errors.Truncated("teacher t: cut"))
            async with asyncio.timeout(20):
                while not health.healthy:
                    await asyncio.sleep(0.02)
        finally:
            await health.aclose()

    with serving(FormulaEngine(tiny_byte_level)) as url, caplog.at_level(logging.ERROR, "tutelage.pool"):
        asyncio.run(run(url))
    assert failures == ["request", "trial", "trial"]
    assert sum("is tried again" in message for message in caplog.messages) == 2


@pytest.mark.slow
def test_the_only_replica_is_used_again_after_a_malformed_trial(tiny_byte_level: Path) -> None:
    def attack(path: str, number: int, headers: Headers, data: bytes) -> tuple[int, Headers, bytes]:
        if path == "/v1/score" and number == 1:
            return 200, headers, data[: len(data) // 2]
        return rubbish(path, number, headers, data) if number == 2 else (200, headers, data)

    async def run(url: str) -> int:
        async with TeacherPool([TeacherAddress("t", (url,))]) as pool:
            await pool.connect("t")
            return len(await asyncio.wait_for(pool.score("t", [1, 2, 3], 1, 4), 20))

    with attacking(FormulaEngine(tiny_byte_level), attack) as url:
        assert asyncio.run(run(url)) == 2


@pytest.mark.slow
def test_a_huge_retry_after_does_not_lose_a_teacher(tiny_byte_level: Path) -> None:
    def attack(path: str, number: int, headers: Headers, data: bytes) -> tuple[int, Headers, bytes]:
        if path == "/v1/score" and number == 1:
            return 503, headers | {"retry-after": "99999"}, b"{}"
        return 200, headers, data

    async def run(url: str) -> int:
        async with TeacherPool([TeacherAddress("t", (url,), unavailable_timeout_s=4.0)]) as pool:
            await pool.connect("t")
            return len(await asyncio.wait_for(pool.score("t", [1, 2, 3], 1, 4), 20))

    with attacking(FormulaEngine(tiny_byte_level), attack) as url:
        assert asyncio.run(run(url)) == 2
