"""Rate limits: the headers in which a server states its limit, and the limit that a run file sets.

Retry-After (RFC 9110) is a number of seconds or a date. It has no upper limit here: health.py and start_wait.py limit
it by the timeouts of the teacher. `x-ratelimit-remaining-requests`, `…-remaining-tokens` and `x-ratelimit-reset-…` are
headers of OpenAI that many servers have. A reset is a number of seconds or a duration such as 6m0s or 20ms.
"""

import asyncio
import re
from collections import deque
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

WINDOW_S = 60.0
MAX_RESET_S = 60.0  # a reset is that of the whole quota, a part of which may be free earlier: ask again after this time
UNITS_S = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
DURATION = re.compile(r"(?:\d{1,9}(?:\.\d{1,9})?(?:ms|h|m|s))+")
PART = re.compile(r"(\d+(?:\.\d+)?)(ms|h|m|s)")


def retry_after_s(headers: Mapping[str, str], now: float) -> float | None:
    """Return the seconds after which a refused request may be repeated; None if the headers do not state them.

    now  seconds since the epoch
    """
    value = headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", value):
        return float(value)
    try:
        return max(parsedate_to_datetime(value).timestamp() - now, 0.0)
    except (ValueError, TypeError, OverflowError, OSError):
        return exhausted_s(headers) or None


def exhausted_s(headers: Mapping[str, str]) -> float:
    """Return the seconds until a used-up quota is reset, at most MAX_RESET_S; 0 if requests and tokens remain."""
    used_up = [
        kind for kind in ("requests", "tokens") if headers.get(f"x-ratelimit-remaining-{kind}", "").strip() == "0"
    ]
    resets_s = (_duration_s(headers.get(f"x-ratelimit-reset-{kind}", "")) for kind in used_up)
    return min(max(resets_s, default=0.0), MAX_RESET_S)


def _duration_s(text: str) -> float:
    """Return a duration in seconds; 0 for any other text."""
    text = text.strip()
    if re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text):
        return float(text)
    if not DURATION.fullmatch(text):
        return 0.0
    return sum(float(number) * UNITS_S[unit] for number, unit in PART.findall(text))


class TokenRateLimiter:
    """Limit the tokens that are sent within any minute. A request with more tokens than the limit is sent alone."""

    def __init__(self, tokens_per_minute: int | None) -> None:
        self._limit = tokens_per_minute
        self._sent: deque[tuple[float, int]] = deque()  # time and tokens of each request of the last minute

    @property
    def is_limited(self) -> bool:
        """Whether there is a limit."""
        return self._limit is not None

    async def wait(self, tokens: int) -> None:
        """Wait until a request of this many tokens may be sent, and count it. One caller at a time."""
        if self._limit is None:
            return
        clock = asyncio.get_running_loop().time
        while (pause_s := self._pause_s(tokens, clock())) > 0:
            await asyncio.sleep(pause_s)
        self._sent.append((clock(), tokens))

    def _pause_s(self, tokens: int, now: float) -> float:
        """Return the seconds until the tokens of the last minute and this request together are within the limit."""
        assert self._limit is not None
        while self._sent and self._sent[0][0] <= now - WINDOW_S:
            self._sent.popleft()
        excess = sum(count for _, count in self._sent) + tokens - self._limit
        pause_s = 0.0
        for sent_at, count in self._sent:
            if excess <= 0:
                break
            excess, pause_s = excess - count, sent_at + WINDOW_S - now
        return max(pause_s, 0.0)
