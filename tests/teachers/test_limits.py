"""Concurrency limit of a replica, and the policies of hedging and backoff."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teachers.client.limits import INITIAL_LIMIT, MIN_HEDGE_S, ConcurrencyLimiter, HedgePolicy, backoff_s


def run(limiter: ConcurrencyLimiter, seconds: float, count: int) -> None:
    for _ in range(count):
        limiter.on_success(seconds, 512, limiter.limit)


def test_the_limit_grows_while_the_latency_is_low() -> None:
    limiter = ConcurrencyLimiter(16)
    run(limiter, 0.1, 300)
    assert limiter.limit == 16


def test_the_limit_does_not_grow_when_requests_only_queue_longer() -> None:
    """A server that processes one request at a time: with n in flight, each takes n times as long."""
    limiter = ConcurrencyLimiter(64)
    for _ in range(2000):
        limiter.on_success(0.1 * limiter.limit, 512, limiter.limit)
    assert INITIAL_LIMIT <= limiter.limit <= 20


def test_the_limit_does_not_grow_if_it_is_not_reached() -> None:
    limiter = ConcurrencyLimiter(16)
    for _ in range(300):
        limiter.on_success(0.1, 512, 1)
    assert limiter.limit == INITIAL_LIMIT


def test_an_overload_decreases_the_limit_to_at_least_1() -> None:
    limiter = ConcurrencyLimiter(16)
    run(limiter, 0.1, 300)
    limiter.on_overload()
    assert limiter.limit == 11
    for _ in range(50):
        limiter.on_overload()
    assert limiter.limit == 1


def test_a_reset_limit_starts_at_1_and_grows_again() -> None:
    limiter = ConcurrencyLimiter(8)
    limiter.reset()
    assert limiter.limit == 1
    run(limiter, 0.1, 100)
    assert limiter.limit == 8


@given(st.lists(st.tuples(st.floats(1e-4, 1e3), st.integers(1, 10_000), st.booleans())), st.integers(1, 64))
def test_the_limit_stays_between_1_and_its_maximum(responses: list[tuple[float, int, bool]], maximum: int) -> None:
    limiter = ConcurrencyLimiter(maximum)
    for seconds, tokens, overloaded in responses:
        limiter.on_overload() if overloaded else limiter.on_success(seconds, tokens, limiter.limit)
        assert 1 <= limiter.limit <= maximum


def test_no_request_is_hedged_before_enough_latencies_are_known() -> None:
    policy = HedgePolicy()
    for _ in range(19):
        policy.on_success(1.0, 512)
    assert policy.delay_s(512) is None
    policy.on_success(1.0, 512)
    assert policy.delay_s(512) == pytest.approx(2.0)


def test_the_hedge_delay_grows_with_the_length_and_has_a_minimum() -> None:
    policy = HedgePolicy()
    for _ in range(20):
        policy.on_success(0.64, 512)
    assert policy.delay_s(1152) == pytest.approx(2 * 1.28)
    for _ in range(300):
        policy.on_success(1e-4, 512)
    assert policy.delay_s(512) == MIN_HEDGE_S


def test_three_percent_of_the_requests_are_hedged_and_four_at_once() -> None:
    policy = HedgePolicy()
    hedged = 0
    for _ in range(1000):
        policy.on_request()
        hedged += policy.take_credit()
    assert 25 <= hedged <= 30
    for _ in range(1000):
        policy.on_request()
    assert [policy.take_credit() for _ in range(6)] == [True] * 4 + [False] * 2


def test_the_backoff_grows_up_to_its_maximum() -> None:
    waits = [backoff_s(failures) for failures in range(1, 30)]
    assert 0.15 < waits[0] < 0.35
    assert waits[3] > waits[0] * 3
    assert max(waits) <= 12.5
    assert backoff_s(10_000) <= 12.5
