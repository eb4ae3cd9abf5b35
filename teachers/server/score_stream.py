"""The response of one score request as a stream, with the scoring tasks and the size of the unsent rows."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable

from teachers.protocol.rows import Rows
from teachers.protocol.wire_format import StreamWriter
from teachers.server.request_log import RequestRecord

log = logging.getLogger("tutelage.teacher")
Task = asyncio.Task[tuple[int, Rows]]
OnEnd = Callable[["ScoreStream", Exception | None], None]


class ScoreStream:
    """Asynchronous iterator over the chunks of one Arrow stream. An incomplete stream has no end marker.

    The tasks start before the first chunk is read, so `aclose` cancels them even if no chunk was read. A plain async
    generator would not: if it is closed before its first step, none of its code runs.

    tasks       scoring tasks by index of the sequence, until their rows are encoded
    held_bytes  size of the rows that are scored and not yet received by the client
    on_abort    callback that stops the sender when the service aborts the stream
    """

    def __init__(self, writer: StreamWriter, record: RequestRecord, on_end: OnEnd) -> None:
        self.tasks: dict[int, Task] = {}
        self.client = record.client
        self.held_bytes = 0
        self.on_abort: Callable[[], object] | None = None
        self._writer, self._record, self._on_end = writer, record, on_end
        self._aborted = False
        self._chunks = self._generate()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        return await anext(self._chunks)

    async def aclose(self) -> None:
        """Cancel the unfinished work. The record ends as `client_gone` unless it has ended before."""
        await self._chunks.aclose()
        await self._release()

    def hold(self, rows: Rows) -> None:
        """Add the rows of a finished sequence to `held_bytes`."""
        if not self._aborted:
            self.held_bytes += _num_bytes(rows)

    def abort(self, reason: str) -> None:
        """Abort the response, and stop counting its rows."""
        self._record.abort(reason)
        self._aborted, self.held_bytes = True, 0
        if self.on_abort is not None:
            self.on_abort()

    async def _generate(self) -> AsyncGenerator[bytes, None]:
        failure: Exception | None = None
        try:
            sent = 0  # bytes of the rows in the last chunk: they are received when the next chunk is accepted
            for done in asyncio.as_completed(list(self.tasks.values())):
                index, rows = await done
                if self._aborted:
                    return
                del self.tasks[index]
                size, chunk = _num_bytes(rows), self._writer.write(index, rows)
                del rows
                yield self._counted(chunk)
                self.held_bytes = max(self.held_bytes - sent, 0)  # it is 0 already if the stream was aborted
                sent = size
            if self._aborted:
                return
            yield self._counted(self._writer.close())
            self._record.complete()
        except TimeoutError:  # the status line is sent already: the client notices the missing end marker
            self._record.abort("deadline")
            log.warning("a response is incomplete: its deadline has passed")
        except Exception as error:  # an engine may raise anything
            failure = error
            self._record.abort("engine")
            log.exception("a response is incomplete: the engine failed")
        finally:
            await self._release(failure)

    def _counted(self, chunk: bytes) -> bytes:
        self._record.count_bytes(len(chunk))
        return chunk

    async def _release(self, failure: Exception | None = None) -> None:
        self._record.abort("client_gone")  # ignored if the record has ended
        self._on_end(self, failure)
        for task in self.tasks.values():
            task.cancel()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)


def _num_bytes(rows: Rows) -> int:
    arrays = (rows.ids, rows.logprobs, rows.actual, rows.tail)
    return sum(array.nbytes for array in arrays) + (0 if rows.chosen is None else rows.chosen.nbytes)
