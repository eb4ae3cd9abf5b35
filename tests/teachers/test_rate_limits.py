"""Rate limits: the headers of a server, and the limit of a run file."""

import asyncio
import time
from email.utils import formatdate
from pathlib import Path

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

import teachers.client.rate_limits as rate_limits
from teachers.client.addresses import TeacherAddress
from teachers.client.dialects.native import NativeClient
from teachers.client.http import Transport
from teachers.client.load_balancer import LoadBalancer
from teachers.client.rate_limits import TokenRateLimiter, exhausted_s, retry_after_s
from teachers.protocol.errors import Overloaded, Unauthorized
from teachers.protocol.messages import ScoreRequest
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
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "6m0s"}, 360.0),
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
        ("0", "1h2m3.5s", 3723.5),
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
