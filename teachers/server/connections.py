"""Limits of one HTTP connection that uvicorn lacks: the size of a request's head and trailers, the time in which a
request must arrive, and the time in which a client must receive data.
"""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 32 * 1024  # of one request: all bytes outside the body, including trailers and chunk extensions
MAX_UNREAD_BYTES = 2 << 20  # of a body that arrives after the response, so that a client with a wrong key can read it
MAX_PIPELINED = 256  # requests that arrive before an earlier one is answered: each costs far more memory than bytes
PIECE_BYTES = 8 * 1024  # unit in which bytes are parsed and counted: a head is found too large up to one piece late
MAX_ARRIVAL_S = 30.0  # head and body together; a body alone has a shorter limit and is answered with 408
STALL_CHECK_S = 40.0  # longer than Limits.max_stall_s, so that the application aborts a stalled response first


class BoundedConnection(HttpToolsProtocol):
    """HTTP connection that is closed if its client is too slow, or sends too many bytes that are not part of a body."""

    _arrival_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None
    _piece_bytes = 0  # size of the piece that is being parsed
    _head_bytes = 0  # bytes of the current request that are not part of the body
    _chunk_bytes = 0  # body bytes of the current chunk
    _unread_bytes = 0  # body bytes that arrived after the response
    _num_resumed = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_arrival_timer()
        self._check_stall((0, 0, False))

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._arrival_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        for begin in range(0, len(data), PIECE_BYTES):
            if self.transport.is_closing():
                return
            piece = data[begin : begin + PIECE_BYTES]
            self._piece_bytes = len(piece)
            self._head_bytes += len(piece)
            super().data_received(piece)
            if (
                self._head_bytes > MAX_HEAD_BYTES
                or self._unread_bytes > MAX_UNREAD_BYTES
                or len(self.pipeline) > MAX_PIPELINED
            ):
                self.transport.abort()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes, self._chunk_bytes, self._unread_bytes = self._piece_bytes, 0, 0
        self._start_arrival_timer()

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        if self.cycle.response_complete:
            self._unread_bytes += len(body)
        self._head_bytes -= len(body)
        self._chunk_bytes += len(body)

    def on_chunk_complete(self) -> None:
        """Exclude the framing of a chunk from the limit of the head, so that a body may arrive in many small chunks."""
        self._head_bytes -= len(f"{self._chunk_bytes:x}") + 4
        self._chunk_bytes = 0

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if self._arrival_timer is not None:
            self._arrival_timer.cancel()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._num_resumed += 1

    def _check_stall(self, previous: tuple[int, int, bool]) -> None:
        """Abort if the client has received nothing since the last check, or if closing takes too long."""
        closing = self.transport.is_closing()
        state = (self.transport.get_write_buffer_size(), self._num_resumed, closing)
        if state[0] and (state == previous or (closing and previous[2])):
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
