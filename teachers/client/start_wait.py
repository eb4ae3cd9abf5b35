"""Wait at the start of a run until a teacher responds, and report the wait.

The wait continues while a server may still be starting: connection refused, name not resolved, 429, 5xx, not ready, or
a Ray Serve proxy without the application. An error that only the user can correct ends it at once: a wrong key, model,
path or certificate.
"""

import asyncio
import logging
from collections.abc import Sequence

from teachers.client.replica import may_recover, most_useful_error
from teachers.protocol.errors import Overloaded, Unavailable

log = logging.getLogger("tutelage.pool")
RETRY_S = 1.0
REPORT_PAUSE_S = 10.0  # a Retry-After of this time or longer is reported
FIRST_REPORT_S, MAX_REPORT_S = 10.0, 320.0  # between two reports; each interval is twice as long as the one before


class StartWait:
    """The wait for one teacher. It begins when the object is created, in a running event loop."""

    def __init__(self, teacher: str, timeout_s: float) -> None:
        self._teacher = teacher
        self._timeout_s = timeout_s
        self._began = self._report_at = asyncio.get_running_loop().time()
        self._report_s = FIRST_REPORT_S
        self._reported = False

    @property
    def waited_s(self) -> float:
        """Seconds since the beginning."""
        return asyncio.get_running_loop().time() - self._began

    async def pause(self, errors: Sequence[BaseException]) -> None:
        """Report the errors of the last attempt, and sleep until the next attempt.

        Raises the most useful error if waiting cannot help, or if the time is over.
        """
        error = most_useful_error(errors)
        may_start = all(map(may_recover, errors)) and any(isinstance(each, Unavailable) for each in errors)
        remaining_s = self._timeout_s - self.waited_s
        if not may_start or remaining_s <= 0:
            if may_start and self._timeout_s:
                error.args = (f"{error} (waited {self._timeout_s:g} s: start_timeout_s of this teacher)",)
            raise error
        pause_s = min(_retry_s(errors), remaining_s)
        self._report(error, pause_s)
        await asyncio.sleep(pause_s)

    def end(self) -> None:
        """Report that the teacher responds, if the wait was reported."""
        if self._reported:
            log.warning("teacher %s responds after %.0f s", self._teacher, self.waited_s)

    def _report(self, error: BaseException, pause_s: float) -> None:
        now = asyncio.get_running_loop().time()
        if now < self._report_at:
            return
        details = f", {self.waited_s:.0f} s so far" if self._reported else ""
        details += f", next attempt in {pause_s:.0f} s (the server asked for it)" if pause_s >= REPORT_PAUSE_S else ""
        log.warning("%s; waiting for the teacher up to %g s (start_timeout_s)%s", error, self._timeout_s, details)
        self._report_at = now + self._report_s
        self._report_s = min(2 * self._report_s, MAX_REPORT_S)
        self._reported = True


def _retry_s(errors: Sequence[BaseException]) -> float:
    """Return the seconds until the next attempt: RETRY_S, or the shortest Retry-After if every replica sent one."""
    pauses = [error.retry_after_s or RETRY_S if isinstance(error, Overloaded) else RETRY_S for error in errors]
    return min(pauses)
