"""Rate limits: the headers of a server, and the limit of a run file."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from itertools import pairwise
from pathlib import Path

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

import teachers.client.health as health
import teachers.client.rate_limits as rate_limits
from teachers.client.addresses import TeacherAddress
from teachers.client.dialects.native import NativeClient
from teachers.client.http import Transport
from teachers.client.load_balancer import LoadBalancer
from teachers.client.pool import TeacherPool
from teachers.client.rate_limits import TokenRateLimiter, exhausted_s, retry_after_s
from teachers.protocol.errors import Overloaded, TeacherLost, Unauthorized
from teachers.protocol.messages import ScoreRequest
from teachers.server.app import build_app
from teachers.server.limits import Limits
from teachers.server.service import Service
from tests.serve import FormulaEngine, serving, serving_app

NOW = 1_800_000_000.0


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": formatdate(NOW + 30, usegmt=True)}, 30.0),
        ({"retry-after": formatdate(NOW - 30, usegmt=True)}, 0.0),
        ({"retry-after": "Fri, 99 Foo 2027"}, None),
        ({"retry-after": "99999"}, 99999.0),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "50s"}, 50.0),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "6m0s"}, 60.0),
        ({"retry-after": "2", "x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "6m0s"}, 2.0),
        ({}, None),
    ],
)
def test_a_refused_request_is_repeated_when_the_server_allows_it(
    headers: dict[str, str], expected: float | None
) -> None:
    assert retry_after_s(headers, NOW) == expected


@pytest.mark.parametrize(
    ("remaining", "reset", "expected"),
    [
        ("0", "1s", 1.0),
        ("0", "20ms", 0.02),
        ("0", "0h0m3.5s", 3.5),
        ("0", "1h2m3.5s", 60.0),
        ("0", "12", 12.0),
        ("1", "1s", 0.0),
        ("0", "soon", 0.0),
        ("0", "9" * 40 + "s", 0.0),
        ("", "1s", 0.0),
    ],
)
def test_a_used_up_quota_is_awaited(remaining: str, reset: str, expected: float) -> None:
    headers = {"x-ratelimit-remaining-requests": remaining, "x-ratelimit-reset-requests": reset}
    assert exhausted_s(headers) == pytest.approx(expected)


def test_no_request_is_sent_while_the_quota_is_used_up() -> None:
    app, received = FastAPI(), []

    @app.post("/score")
    async def score(request: Request) -> Response:
        received.append(request.headers["authorization"])
        headers = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "300ms"}
        return JSONResponse({}, headers=headers)

    async def run(url: str) -> float:
        http = Transport("t", url, "key")
        send = lambda: http.post("/score", b"{}", 5, expect="application/json", limit_bytes=99)  # noqa: E731
        await send()
        with pytest.raises(Overloaded, match="its rate limit leaves nothing for 0.* s") as caught:
            await send()
        assert caught.value.retry_after_s is not None
        await asyncio.sleep(caught.value.retry_after_s)
        await send()
        await http.aclose()
        return caught.value.retry_after_s

    with serving_app(app) as url:
        assert 0 < asyncio.run(run(url)) <= 0.3
    assert received == ["Bearer key", "Bearer key"]


@contextmanager
def rate_limited(engine: FormulaEngine, num_refused: int, retry_after_s: float) -> Iterator[tuple[str, list[float]]]:
    """Run a teacher that refuses its first score requests. Yields its address and the times of all score requests."""
    app, times = build_app(Service(engine, Limits())), list[float]()

    @app.middleware("http")
    async def limit(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        if request.url.path == "/v1/score":
            times.append(time.monotonic())
            if len(times) <= num_refused:
                return Response(status_code=429, headers={"retry-after": str(retry_after_s)})
        return await call_next(request)

    with serving_app(app) as url:
        yield url, times


async def score_two(address: TeacherAddress) -> None:
    async with TeacherPool([address]) as pool:
        await pool.connect("t")
        await asyncio.gather(*(pool.score("t", [5, 6, 7 + i], 1, 4) for i in range(2)))


def test_no_request_is_sent_before_retry_after_and_the_wait_is_logged_once(
    tiny_byte_level: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(health, "REPORT_PAUSE_S", 1.0)
    with rate_limited(FormulaEngine(tiny_byte_level), num_refused=2, retry_after_s=1.2) as (url, times):
        asyncio.run(score_two(TeacherAddress("t", (url,))))
    assert len(times) == 4
    assert times[2] - times[0] >= 1.2
    assert caplog.messages == [
        f"teacher t at {url}: HTTP 429; no request is sent to it for 1 s (the server asked for 1 s)",
    ]


def test_a_retry_after_beyond_the_timeout_is_followed_by_an_attempt_before_the_teacher_is_lost(
    tiny_byte_level: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "MAX_PAUSE_SHARE", 0.5)
    with rate_limited(FormulaEngine(tiny_byte_level), num_refused=2, retry_after_s=3600) as (url, times):
        asyncio.run(score_two(TeacherAddress("t", (url,), unavailable_timeout_s=2.0)))
    assert times[2] - times[0] >= 0.95


def test_a_second_replica_that_is_overloaded_at_the_start_is_asked_after_its_retry_after(tiny_byte_level: Path) -> None:
    app, times = FastAPI(), list[float]()

    @app.get("/{path:path}")
    async def refuse(path: str) -> Response:
        times.append(time.monotonic())
        return Response(status_code=429, headers={"retry-after": "2"})

    async def run(*urls: str) -> None:
        async with TeacherPool([TeacherAddress("t", urls)]) as pool:
            await pool.connect("t")
            await asyncio.sleep(1.5)

    with serving(FormulaEngine(tiny_byte_level)) as url, serving_app(app) as overloaded:
        asyncio.run(run(url, overloaded))
    assert len(times) == 1


def test_a_lost_teacher_is_not_asked_before_retry_after(tiny_byte_level: Path) -> None:
    with rate_limited(FormulaEngine(tiny_byte_level), num_refused=99, retry_after_s=1.0) as (url, times):
        address = TeacherAddress("t", (url,), unavailable_timeout_s=1.5, on_unavailable="drop")

        async def run() -> None:
            async with TeacherPool([address]) as pool:
                await pool.connect("t")
                with pytest.raises(TeacherLost):
                    await pool.score("t", [5, 6, 7], 1, 4)
                times.clear()
                await asyncio.sleep(2.5)

        asyncio.run(run())
    pauses_s = [after - before for before, after in pairwise(times)]
    assert pauses_s
    assert min(pauses_s) >= 1.0  # trials without Retry-After are 0.25, 0.5 and 1 s apart


def test_the_tokens_of_any_minute_stay_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_limits, "WINDOW_S", 0.2)

    async def run() -> list[tuple[float, int]]:
        limiter, sent = TokenRateLimiter(100), []
        for tokens in (40, 50, 30, 70, 150, 10):
            await limiter.wait(tokens)
            sent.append((time.monotonic(), tokens))
        return sent

    sent = asyncio.run(run())
    for at, tokens in sent:
        others = sum(count for other, count in sent if at - 0.19 < other < at)
        assert tokens + others <= 100 or (tokens == 150 and others == 0), "a longer request is sent alone"


def test_without_a_limit_nothing_waits() -> None:
    async def run() -> float:
        limiter, began = TokenRateLimiter(None), time.monotonic()
        for _ in range(1000):
            await limiter.wait(1_000_000)
        return time.monotonic() - began

    assert asyncio.run(run()) < 1


def test_sent_tokens_are_counted_and_limited(tiny_byte_level: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_limits, "WINDOW_S", 0.4)

    async def run(url: str) -> tuple[int, float]:
        async def connect(url: str) -> NativeClient:
            return NativeClient("t", url)

        address = TeacherAddress("t", (url,), tokens_per_minute=10)
        balancer = LoadBalancer(address, connect, lambda _: None)
        await balancer.connect()
        began = time.monotonic()
        request = ScoreRequest(sequences=[[5, 6, 7, 8]], starts=[1], top_k=4)
        await asyncio.gather(*(balancer.score(request) for _ in range(4)))
        sent = balancer.stats.sent_tokens
        await balancer.aclose()
        return sent, time.monotonic() - began

    with serving(FormulaEngine(tiny_byte_level)) as url:
        sent, seconds = asyncio.run(run(url))
    assert sent == 16
    assert seconds >= 0.4, "two requests of 4 tokens fit into one window of 10"


def test_every_dialect_sends_the_key(tiny_byte_level: Path) -> None:
    from teachers.client.dialects.base import ReplicaAddress
    from teachers.client.dialects.openai_echo import OpenAIEchoClient
    from teachers.client.dialects.sglang import SglangClient
    from teachers.client.dialects.vllm_openai import VllmOpenAIClient

    app = FastAPI()

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    async def refuse(request: Request) -> Response:
        accepted = request.headers.get("authorization") == "Bearer key"
        body = {"data": [{"id": "m"}], "model_path": "m", "is_generation": True}
        return JSONResponse(body, 200 if accepted else 401)

    async def ping(url: str, key: str | None) -> None:
        address = ReplicaAddress("t", url, key, tokenizer=tiny_byte_level)
        for client_type in (OpenAIEchoClient, VllmOpenAIClient, SglangClient):
            client = client_type(address)
            try:
                await client.ping(5)
            finally:
                await client.aclose()

    with serving_app(app) as url:
        asyncio.run(ping(url, "key"))
        with pytest.raises(Unauthorized, match="requires a key"):
            asyncio.run(ping(url, None))
