"""One request from its arrival to the last byte of its answer: what the request log and the meters learn of it.

Never a text, a token id or a key. The log is the logger `tutelage.requests` at level INFO: one JSON object a line.
"""

import json
import logging
import secrets
import time

from teachers.protocol import ScoreRequest
from teachers.serving.meters import Meters

log = logging.getLogger("tutelage.requests")


class Exchange:
    """Ends once; what is said of its end later is not heard."""

    def __init__(self, meters: Meters, peer: str | None, what: str) -> None:
        self.id = secrets.token_hex(8)
        self._meters = meters
        self._said = {"id": self.id, "peer": peer, "what": what, "sequences": 0, "tokens": 0, "top_k": 0}
        self._bytes = 0
        self._admitted = self._ended = False
        self._began = time.monotonic()

    def asks(self, question: ScoreRequest) -> None:
        """What is asked, as far as numbers say it."""
        tokens = sum(map(len, question.sequences))
        self._said |= {"sequences": len(question.sequences), "tokens": tokens, "top_k": question.top_k}
        if question.chosen:
            self._said["chosen"] = question.num_chosen

    def admitted(self) -> None:
        """The engine works on it: its time counts."""
        self._admitted = True

    def sends(self, num_bytes: int) -> None:
        self._bytes += num_bytes
        self._meters.sent_bytes.inc(num_bytes)

    def refused(self, status: int, reason: str) -> None:
        if not self._ended:
            self._meters.rejected.labels(reason).inc()
        self._end(status, reason)

    def aborted(self, reason: str) -> None:
        """The status line was out, and the answer did not become whole."""
        if not self._ended:
            self._meters.aborted.labels(reason).inc()
        self._end(200, reason)

    def answered(self, status: int = 200) -> None:
        self._end(status, "answered")

    def _end(self, status: int, outcome: str) -> None:
        if self._ended:
            return
        self._ended = True
        seconds = time.monotonic() - self._began
        if self._admitted:
            self._meters.request_seconds.observe(seconds)
        if log.isEnabledFor(logging.INFO):
            end = {"status": status, "outcome": outcome, "seconds": round(seconds, 4), "bytes": self._bytes}
            log.info(json.dumps(self._said | end))
