"""Concurrency limit of a replica, delay of hedged requests, and backoff. The module uses no clock and no network.

The latency of a request is measured per token plus a fixed overhead, so that short and long requests are comparable.
"""

import math
import random
from collections import deque

OVERHEAD_TOKENS = 128  # a round trip costs about as much as this many tokens
INITIAL_LIMIT = 4.0
LATENCY_FACTOR = 3.0  # at 3 × the lowest latency, a request spends 2/3 of it in a queue: more concurrency does not help
DECREASE = 0.7
MIN_HEDGE_S = 0.05  # shorter delays are noise
MIN_SAMPLES = 20  # latencies that HedgePolicy needs for an estimate


def latency_per_token(seconds: float, tokens: int) -> float:
    """Return the latency in seconds per token, with the fixed overhead counted as OVERHEAD_TOKENS."""
    return seconds / (tokens + OVERHEAD_TOKENS)


class ConcurrencyLimiter:
    """Number of concurrent requests that one replica sustains: additive increase, multiplicative decrease."""

    def __init__(self, maximum: int) -> None:
        self._maximum = float(maximum)
        self._limit = min(INITIAL_LIMIT, self._maximum)
        self._lowest = math.inf

    @property
    def limit(self) -> int:
        """Largest number of concurrent requests, at least 1."""
        return int(self._limit)

    def on_success(self, seconds: float, tokens: int, in_flight: int) -> None:
        """Increase the limit by 1 / limit, that is by one per round, if it was reached and the latency is low."""
        latency = latency_per_token(seconds, tokens)
        self._lowest = min(latency, self._lowest)
        if in_flight >= self.limit and latency <= LATENCY_FACTOR * self._lowest:
            self._limit = min(self._maximum, self._limit + 1 / self._limit)

    def on_overload(self) -> None:
        """Decrease the limit: the replica returned 429 or 503, or did not respond in time."""
        self._limit = max(1.0, self._limit * DECREASE)

    def reset(self) -> None:
        """Start with one request: the replica was unavailable and may be another machine now."""
        self._limit, self._lowest = 1.0, math.inf


class HedgePolicy:
    """Decide when a slow request is sent a second time, and limit how often that happens.

    quantile  quantile of the recent latencies that is considered usual
    factor    multiple of the usual latency after which a request is hedged
    budget    hedged requests per request, in the long run
    burst     largest number of hedged requests at once
    """

    def __init__(self, quantile: float = 0.95, factor: float = 2.0, budget: float = 0.03, burst: int = 4) -> None:
        self._quantile, self._factor = quantile, factor
        self._budget, self._burst = budget, float(burst)
        self._latencies: deque[float] = deque(maxlen=256)
        self._credit = 0.0

    def on_success(self, seconds: float, tokens: int) -> None:
        """Record the latency of a request."""
        self._latencies.append(latency_per_token(seconds, tokens))

    def on_request(self) -> None:
        """Add the credit of a new request."""
        self._credit = min(self._burst, self._credit + self._budget)

    def delay_s(self, tokens: int) -> float | None:
        """Return the seconds after which a request of this length is hedged; None before MIN_SAMPLES latencies."""
        if len(self._latencies) < MIN_SAMPLES:
            return None
        ordered = sorted(self._latencies)
        usual = ordered[int(self._quantile * (len(ordered) - 1))]
        return max(MIN_HEDGE_S, self._factor * usual * (tokens + OVERHEAD_TOKENS))

    def take_credit(self) -> bool:
        """Take the credit of one hedged request and return True, or return False if there is none."""
        if self._credit < 1:
            return False
        self._credit -= 1
        return True


def backoff_s(failures: int, first: float = 0.25, maximum: float = 10.0) -> float:
    """Return the seconds to wait before the next attempt: exponential in the failures, with jitter of ±25 %."""
    return min(maximum, first * 2.0 ** min(failures - 1, 16)) * random.uniform(0.75, 1.25)
