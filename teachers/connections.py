"""What one connection may hold, and for how long: uvicorn has no limit on a head's size, on the time that a request
takes to arrive, or on the time that a client leaves an answer untaken.
"""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 32 * 1024
MAX_ARRIVAL_S = 30.0  # head and body together; a body alone has less, and is answered with 408
MAX_STALL_S = 40.0  # of an answer that is not taken; the application gives up earlier


class BoundedConnection(HttpToolsProtocol):
    """Closes what sends or takes too slowly, or sends a head without end."""

    _arrival: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None
    _head_bytes: int | None = None  # of a head that is being read, after the first piece of it

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._arrival, self._stall):
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

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self.loop.call_later(MAX_STALL_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._stall = self.loop.call_later(MAX_STALL_S, self.transport.abort)  # close() waits for what is untaken

    def _expect(self) -> None:
        if self._arrival is not None:
            self._arrival.cancel()
        self._arrival = self.loop.call_later(MAX_ARRIVAL_S, self._give_up)

    def _give_up(self) -> None:
        if self.flow.read_paused:  # what is late is ours: an earlier request of this connection is being answered
            self._expect()
        else:
            self.transport.abort()
