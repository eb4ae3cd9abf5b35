"""How much to ask at once, and how long is too long. Pure bookkeeping: no clock, no network.

A question's latency is counted per token plus a fixed part, so that long and short ones can be compared.
"""

import math
import random
from collections import deque

FIXED_TOKENS = 128  # a round trip costs about as much as this many tokens
START = 4.0
HOLDS = 3.0  # at three times the lowest latency two thirds of it are waiting: more at once would only wait longer
SHRINK = 0.7
LEAST_S = 0.05  # sooner, a straggler is only a hiccup


def per_unit(seconds: float, tokens: int) -> float:
    """Latency in seconds per token, the fixed part included."""
    return seconds / (tokens + FIXED_TOKENS)


class Pace:
    """How many questions one replica sustains at once: more while its latency holds, fewer when it complains."""

    def __init__(self, most: int) -> None:
        self._most = float(most)
        self._limit = min(START, self._most)
        self._lowest = math.inf

    @property
    def limit(self) -> int:
        """Questions to have under way at once, at least 1."""
        return int(self._limit)

    def answered(self, seconds: float, tokens: int, under_way: int) -> None:
        """An answer came. The limit grows by one a round, and only if it was in use."""
        latency = per_unit(seconds, tokens)
        self._lowest = min(latency, self._lowest)
        if under_way >= self.limit and latency <= HOLDS * self._lowest:
            self._limit = min(self._most, self._limit + 1 / self._limit)

    def complained(self) -> None:
        """It was too much: 429, 503 or no answer in time."""
        self._limit = max(1.0, self._limit * SHRINK)

    def restart(self) -> None:
        """It was away, and may be another machine now: begin with one question."""
        self._limit, self._lowest = 1.0, math.inf


class Stragglers:
    """Which questions of a teacher take far longer than usual, and how many of them may be asked twice.

    quantile  of recent latencies beyond which a question is a straggler (times `slack`)
    share     of all questions that may be asked twice, in the long run; `burst` at once
    """

    def __init__(self, quantile: float = 0.95, slack: float = 2.0, share: float = 0.03, burst: int = 4) -> None:
        self._quantile, self._slack = quantile, slack
        self._share, self._burst = share, float(burst)
        self._recent: deque[float] = deque(maxlen=256)
        self._credit = 0.0

    def answered(self, seconds: float, tokens: int) -> None:
        self._recent.append(per_unit(seconds, tokens))

    def asked(self) -> None:
        """A question is asked for the first time: it earns its share of a second asking."""
        self._credit = min(self._burst, self._credit + self._share)

    def patience_s(self, tokens: int) -> float | None:
        """Seconds after which a question of so many tokens is a straggler; None before enough was seen."""
        if len(self._recent) < 20:
            return None
        ordered = sorted(self._recent)
        usual = ordered[int(self._quantile * (len(ordered) - 1))]
        return max(LEAST_S, self._slack * usual * (tokens + FIXED_TOKENS))

    def may_ask_twice(self) -> bool:
        """Take one second asking, if one is left."""
        if self._credit < 1:
            return False
        self._credit -= 1
        return True


def backoff_s(failures: int, first: float = 0.25, most: float = 10.0) -> float:
    """Seconds to leave a failing replica alone before it is tried again, with jitter."""
    return min(most, first * 2.0 ** min(failures - 1, 16)) * random.uniform(0.75, 1.25)
