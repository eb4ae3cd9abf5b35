"""Tokens that wait for an answer, how fast they were answered lately, and so when there is room for more."""

import math
import time
from collections.abc import Callable

HALF_LIFE_S = 20.0  # of what is remembered, in seconds of work
LEAST_S, MOST_S = 1, 30  # of a Retry-After


class Backlog:
    """Counts what is under way; the clock stands still while nothing is.

    tokens       of all sequences that are not answered yet
    progress_at  when work last began on an empty backlog or something was answered, in seconds of the clock
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._at = clock()
        self._busy_s = self._answered_tokens = 0.0
        self.tokens = 0
        self.progress_at = -math.inf

    def enter(self, tokens: int) -> None:
        """They wait now."""
        self._advance()
        if not self.tokens:
            self.progress_at = self._at
        self.tokens += tokens

    def leave(self, tokens: int, answered: bool) -> None:
        """They wait no longer, because they were answered or because nobody wants them any more."""
        self._advance()
        self.tokens -= tokens
        if answered:
            self.progress_at = self._at
            self._answered_tokens += tokens

    @property
    def tokens_per_s(self) -> float:
        """Tokens answered in a second of work lately; 0 before the first answer."""
        return self._answered_tokens / self._busy_s if self._busy_s else 0.0

    def wait_s(self, tokens: int) -> int:
        """Whole seconds, 1 … 30, until this many have left; while none ever has, as long again as it took so far."""
        self._advance()
        rate = self.tokens_per_s
        return bounded_s(tokens / rate if rate else self._busy_s)

    def _advance(self) -> None:
        now = self._clock()
        if self.tokens:
            kept = 0.5 ** ((now - self._at) / HALF_LIFE_S)
            self._busy_s = self._busy_s * kept + now - self._at
            self._answered_tokens *= kept
        self._at = now


def bounded_s(seconds: float) -> int:
    """A time to wait as Retry-After says it."""
    return min(max(math.ceil(seconds), LEAST_S), MOST_S)
