"""One replica of a teacher: its state, its concurrency limit and its requests in flight."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from teachers.client.dialects.base import ReplicaClient
from teachers.client.limits import ConcurrencyLimiter
from teachers.protocol.errors import (
    FingerprintMismatch,
    ProtocolError,
    TeacherError,
    TlsError,
    Unavailable,
    VersionMismatch,
)
from teachers.protocol.messages import ScoreRequest, TeacherCard
from teachers.protocol.rows import Rows

PING_TIMEOUT_S = 5.0
MIN_TRIAL_S = 30.0
ClientFactory = Callable[[str], Awaitable[ReplicaClient]]


class Replica:
    """An address, and a client after the first successful connection.

    healthy       requests are sent to it
    quarantined   it failed, and trial requests are sent to it until one succeeds
    probing       a check whether its process responds is running
    banned        it responds, but is another teacher than before
    failures      number of failures since its last response
    paused_until  no request before this time, in seconds of the event loop's clock (Retry-After)
    """

    def __init__(self, url: str, make_client: ClientFactory, max_concurrency: int) -> None:
        self.url = url
        self._make_client = make_client
        self._client: ReplicaClient | None = None
        self.limiter = ConcurrencyLimiter(max_concurrency)
        self.healthy = self.quarantined = self.probing = self.banned = False
        self.failures = 0
        self.paused_until = 0.0
        self.in_flight = self.tokens_in_flight = 0
        self._tasks: set[asyncio.Task[list[Rows]]] = set()

    async def client(self) -> ReplicaClient:
        """Return the client; the first call detects the dialect of the server. Raises TeacherError."""
        if self._client is None:
            self._client = await self._make_client(self.url)
        return self._client

    def can_accept(self, now: float, extra: int = 0) -> bool:
        """Return whether one more request may be sent, with `extra` requests above the concurrency limit."""
        return self.healthy and now >= self.paused_until and self.in_flight < self.limiter.limit + extra

    def acquire(self, tokens: int) -> None:
        """Count a request as in flight until `release`."""
        self.in_flight += 1
        self.tokens_in_flight += tokens

    def release(self, tokens: int) -> None:
        """Stop counting a request as in flight."""
        self.in_flight -= 1
        self.tokens_in_flight -= tokens

    async def score(self, request: ScoreRequest, card: TeacherCard, timeout_s: float) -> Rows:
        """Score one sequence. Raises TeacherError, and Unavailable if abort_requests is called meanwhile."""
        client = await self.client()
        task = asyncio.create_task(client.score(request, card, timeout_s))
        self._tasks.add(task)
        try:
            return (await task)[0]
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise
            raise Unavailable(f"the request to {self.url} was aborted: the replica does not respond") from None
        finally:
            self._tasks.discard(task)

    async def ping(self) -> None:
        """Raise Unavailable if the process does not respond at all."""
        await (await self.client()).ping(PING_TIMEOUT_S)

    async def send_trial(self, card: TeacherCard, timeout_s: float) -> None:
        """Check the card and score a short sequence. Raises TeacherError."""
        client = await self.client()
        await client.check(card, timeout_s)
        sequence = [card.bos_id or 0, *range(min(7, card.vocab_size))]
        request = ScoreRequest(sequences=[sequence], starts=[1], top_k=min(16, card.max_top_k))
        await client.score(request, card, timeout_s)

    def abort_requests(self) -> None:
        """Abort every request in flight. Each of them raises Unavailable."""
        for task in self._tasks:
            task.cancel()

    async def drain(self) -> None:
        """Wait for the requests in flight, then close."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.aclose()

    async def aclose(self) -> None:
        if self._client is not None:
            await self._client.aclose()


NEEDS_CHANGE = (FingerprintMismatch, VersionMismatch, TlsError)  # only the user can correct them


def may_recover(error: BaseException) -> bool:
    """Return whether to quarantine a replica that fails with this error at the start of a run, instead of raising it.

    A different version or model, a wrong key, a wrong address and an insecure connection are raised.
    """
    return isinstance(error, (Unavailable, ProtocolError)) and not isinstance(error, NEEDS_CHANGE)


def most_useful_error(errors: Sequence[BaseException]) -> BaseException:
    """Return the error to show first: that of an invalid replica before that of an unavailable one."""
    return min(errors, key=lambda e: (may_recover(e), isinstance(e, Unavailable), not isinstance(e, TeacherError)))
