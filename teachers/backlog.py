"""Count of queued tokens and the recent rate of work, from which a server computes Retry-After."""

import math
import time
from collections.abc import Callable

HALF_LIFE_S = 20.0  # seconds of work after which a measurement counts half
MIN_RETRY_S, MAX_RETRY_S = 1, 30


class Backlog:
    """Queued tokens and the rate at which they are finished. The clock stops while nothing is queued.

    tokens       tokens of all unfinished sequences
    progress_at  time of the last progress, in seconds of the clock: a sequence was finished or entered an empty backlog
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._updated_at = clock()
        self._busy_s = self._finished_tokens = 0.0
        self.tokens = 0
        self.progress_at = -math.inf

    def enter(self, tokens: int) -> None:
        """Add the tokens of a sequence."""
        self._advance()
        if not self.tokens:
            self.progress_at = self._updated_at
        self.tokens += tokens

    def leave(self, tokens: int, finished: bool) -> None:
        """Remove the tokens of a sequence that was finished or cancelled."""
        self._advance()
        self.tokens -= tokens
        if finished:
            self.progress_at = self._updated_at
            self._finished_tokens += tokens

    @property
    def tokens_per_s(self) -> float:
        """Recently finished tokens per second of work; 0 before the first one."""
        return self._finished_tokens / self._busy_s if self._busy_s else 0.0

    def wait_s(self, tokens: int) -> int:
        """Return the whole seconds, 1 … 30, until this many tokens are finished.

        Before the first sequence is finished, the estimate is the time spent so far.
        """
        self._advance()
        rate = self.tokens_per_s
        return retry_after_s(tokens / rate if rate else self._busy_s)

    def _advance(self) -> None:
        now = self._clock()
        if self.tokens:  # exponential moving sums over working time
            decay = 0.5 ** ((now - self._updated_at) / HALF_LIFE_S)
            self._busy_s = self._busy_s * decay + now - self._updated_at
            self._finished_tokens *= decay
        self._updated_at = now


def retry_after_s(seconds: float) -> int:
    """Round a waiting time up to a valid Retry-After value."""
    return min(max(math.ceil(seconds), MIN_RETRY_S), MAX_RETRY_S)
