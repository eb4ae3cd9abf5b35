"""The record of one request, from its arrival to the last byte of its response, for the request log and the metrics.

It never contains a text, a token id or a key. The log is the logger `tutelage.requests` at level INFO, with one JSON
object per line.
"""

import json
import logging
import secrets
import time

from teachers.protocol.messages import ScoreRequest
from teachers.server.metrics import ServerMetrics

log = logging.getLogger("tutelage.requests")


class RequestRecord:
    """The record of one request. It ends once; further ends are ignored.

    client  identity for fair shares: the address without the port, or the value that a guard sets. Not logged
    """

    def __init__(self, metrics: ServerMetrics, peer: str | None, route: str) -> None:
        self.id = secrets.token_hex(8)
        self.client = (peer or "").rpartition(":")[0]
        self._metrics = metrics
        self._fields = {"id": self.id, "peer": peer, "route": route, "sequences": 0, "tokens": 0, "top_k": 0}
        self._bytes = 0
        self._admitted = self._ended = False
        self._began = time.monotonic()

    def describe(self, request: ScoreRequest) -> None:
        """Record the size of a score request."""
        tokens = sum(map(len, request.sequences))
        self._fields |= {"sequences": len(request.sequences), "tokens": tokens, "top_k": request.top_k}
        if request.chosen:
            self._fields["chosen"] = request.num_chosen

    def admit(self) -> None:
        """Record that the engine works on the request: its duration counts for the metrics."""
        self._admitted = True

    def count_bytes(self, num_bytes: int) -> None:
        """Record bytes of the response."""
        self._bytes += num_bytes
        self._metrics.sent_bytes.inc(num_bytes)

    def reject(self, status: int, reason: str) -> None:
        """End the record of a rejected request."""
        if not self._ended:
            self._metrics.rejected.labels(reason).inc()
        self._end(status, reason)

    def abort(self, reason: str) -> None:
        """End the record of a response that is incomplete although its status line was sent."""
        if not self._ended:
            self._metrics.aborted.labels(reason).inc()
        self._end(200, reason)

    def complete(self, status: int = 200) -> None:
        """End the record of a complete response."""
        self._end(status, "completed")

    def _end(self, status: int, result: str) -> None:
        if self._ended:
            return
        self._ended = True
        seconds = time.monotonic() - self._began
        if self._admitted:
            self._metrics.request_seconds.observe(seconds)
        if log.isEnabledFor(logging.INFO):
            end = {"status": status, "result": result, "seconds": round(seconds, 4), "bytes": self._bytes}
            log.info(json.dumps(self._fields | end))
