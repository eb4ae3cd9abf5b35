"""What one connection may hold, and for how long: uvicorn has no limit on a head's size, on the time that a request
takes to arrive, or on the time that a client leaves an answer untaken.
"""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 32 * 1024
MAX_ARRIVAL_S = 30.0  # head and body together; a body alone has less, and is answered with 408
LOOK_S = 40.0  # what lies untaken from one look to the next is given up; the application does so earlier


class BoundedConnection(HttpToolsProtocol):
    """Ends what sends or takes too slowly, or sends a head without end."""

    _arrival: asyncio.TimerHandle | None = None
    _next_look: asyncio.TimerHandle | None = None
    _head_bytes: int | None = None  # of a head that is being read, after the first piece of it
    _times_taken = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect()
        self._look((0, 0))

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._arrival, self._next_look):
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
        self._expect()

    def on_headers_complete(self) -> None:
        self._head_bytes = None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if self._arrival is not None:
            self._arrival.cancel()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._times_taken += 1

    def _look(self, before: tuple[int, int]) -> None:
        """End a connection whose other side takes nothing, closed as it may be: closing waits for what is untaken."""
        now = (self.transport.get_write_buffer_size(), self._times_taken)
        if now[0] and now == before:
            self.transport.abort()
        self._next_look = self.loop.call_later(LOOK_S, self._look, now)

    def _expect(self) -> None:
        if self._arrival is not None:
            self._arrival.cancel()
        self._arrival = self.loop.call_later(MAX_ARRIVAL_S, self._give_up)

    def _give_up(self) -> None:
        if self.flow.read_paused:  # what is late is ours: an earlier request of this connection is being answered
            self._expect()
        else:
            self.transport.abort()
