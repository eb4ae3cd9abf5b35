"""Limits of one HTTP connection that uvicorn lacks: the size of a request's head, the time in which a request must
arrive, and the time in which a client must receive data.
"""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 32 * 1024
MAX_ARRIVAL_S = 30.0  # head and body together; a body alone has a shorter limit and is answered with 408
STALL_CHECK_S = 40.0  # longer than Limits.max_stall_s, so that the application aborts a stalled response first


class BoundedConnection(HttpToolsProtocol):
    """Close a connection that sends or receives too slowly, or whose request head is too large."""

    _arrival_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None
    _head_bytes: int | None = None  # received bytes of an incomplete head, without its first piece
    _num_resumed = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_arrival_timer()
        self._check_stall((0, 0))

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._arrival_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        within_head = self._head_bytes is not None
        super().data_received(data)
        if within_head and self._head_bytes is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.transport.abort()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0
        self._start_arrival_timer()

    def on_headers_complete(self) -> None:
        self._head_bytes = None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if self._arrival_timer is not None:
            self._arrival_timer.cancel()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._num_resumed += 1

    def _check_stall(self, previous: tuple[int, int]) -> None:
        """Abort if the client has received nothing since the last check. A closing transport would wait for it."""
        state = (self.transport.get_write_buffer_size(), self._num_resumed)
        if state[0] and state == previous:
            self.transport.abort()
        self._stall_timer = self.loop.call_later(STALL_CHECK_S, self._check_stall, state)

    def _start_arrival_timer(self) -> None:
        if self._arrival_timer is not None:
            self._arrival_timer.cancel()
        self._arrival_timer = self.loop.call_later(MAX_ARRIVAL_S, self._on_late_arrival)

    def _on_late_arrival(self) -> None:
        if self.flow.read_paused:  # the server paused reading: it is still answering an earlier request
            self._start_arrival_timer()
        else:
            self.transport.abort()
