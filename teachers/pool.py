"""N teachers, each with one or more replicas, asked as if they were one.

A question goes to the replica with the fewest tokens outstanding. What can be asked again (errors.Unavailable)
is asked again, elsewhere if there is an elsewhere, with jitter, until the teacher's patience is over; what
cannot is raised at once. A teacher that is killed and restarted costs time, never a sample.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import stamina

from teachers.client import TeacherClient
from teachers.errors import FingerprintMismatch, Overloaded, TeacherError, Unavailable
from teachers.protocol import Card, ScoreRequest
from teachers.rows import Rows

log = logging.getLogger("tutelage.pool")
REST_S = 2.0


@dataclass(frozen=True)
class TeacherAddress:
    """Where a teacher is and how it is to be asked.

    urls          one per replica
    key           bearer key, None for an open teacher
    timeout_s     total time for one question
    patience_s    how long a question is asked again while no replica answers
    concurrency   questions under way at once, per replica
    """

    name: str
    urls: tuple[str, ...]
    key: str | None = field(default=None, repr=False)
    timeout_s: float = 120.0
    patience_s: float = 600.0
    concurrency: int = 8


class _Replica:
    def __init__(self, name: str, client: TeacherClient, concurrency: int) -> None:
        self.name = name
        self.client = client
        self.slots = asyncio.Semaphore(concurrency)
        self.outstanding_tokens = 0
        self.resting_until = 0.0  # after a failure others are preferred for a while

    async def score(self, request: ScoreRequest, card: Card, timeout_s: float) -> Rows:
        tokens = len(request.sequences[0])
        self.outstanding_tokens += tokens
        try:
            async with self.slots:
                rows = (await self.client.score(request, card, timeout_s))[0]
            if self.resting_until:
                log.warning("teacher %s at %s answers again", self.name, self.client.url)
            self.resting_until = 0.0
            return rows
        except Unavailable as error:
            if not self.resting_until:
                log.warning("%s; asking again", error)
            self.resting_until = time.monotonic() + REST_S
            raise
        finally:
            self.outstanding_tokens -= tokens


class TeacherPool:
    """Use as an async context manager, inside one event loop."""

    def __init__(self, addresses: Sequence[TeacherAddress]) -> None:
        self._addresses = {address.name: address for address in addresses}
        self._replicas = {
            a.name: [_Replica(a.name, TeacherClient(a.name, url, a.key), a.concurrency) for url in a.urls]
            for a in addresses
        }
        # a question's patience begins when it can be asked, not while it waits behind others
        self._slots = {a.name: asyncio.Semaphore(a.concurrency * len(a.urls)) for a in addresses}
        self._cards: dict[str, Card] = {}

    async def __aenter__(self) -> "TeacherPool":
        return self

    async def __aexit__(self, *_: object) -> None:
        for replica in [r for replicas in self._replicas.values() for r in replicas]:
            await replica.client.aclose()

    async def connect(self, name: str) -> tuple[Card, dict[str, bytes]]:
        """Ask every replica for its card, and one for the tokenizer's files.

        Raises the first error if no replica answers, and FingerprintMismatch if two differ.
        """
        replicas = self._replicas[name]
        answers = await asyncio.gather(*(r.client.card() for r in replicas), return_exceptions=True)
        cards: list[tuple[_Replica, Card]] = []
        for replica, answer in zip(replicas, answers, strict=True):
            if isinstance(answer, Card):
                cards.append((replica, answer))
            elif not isinstance(answer, Unavailable):
                raise answer
            else:
                log.warning("%s", answer)
        if not cards:
            raise next(a for a in answers if isinstance(a, TeacherError))
        first, card = cards[0]
        for replica, other in cards[1:]:
            if other != card:
                raise FingerprintMismatch(f"teacher {name}: {replica.client.url} and {first.client.url} differ")
        files = await first.client.tokenizer_files(card)
        self._cards[name] = card
        return card, files

    async def score(self, name: str, sequence: list[int], start: int, top_k: int) -> Rows:
        """One teacher's rows for one sequence. Raises the last error once the teacher's patience is over."""
        address, card = self._addresses[name], self._cards[name]
        request = ScoreRequest(sequences=[sequence], starts=[start], top_k=top_k)
        async with self._slots[name]:
            async for attempt in stamina.retry_context(
                on=_backoff, attempts=None, timeout=address.patience_s, wait_initial=0.2, wait_max=5.0
            ):
                with attempt:
                    return await self._next_replica(name).score(request, card, address.timeout_s)
        raise AssertionError("retry_context returns or raises")

    def _next_replica(self, name: str) -> _Replica:
        now = time.monotonic()
        return min(self._replicas[name], key=lambda r: (now < r.resting_until, r.outstanding_tokens))


def _backoff(error: Exception) -> bool | float:
    """Whether to ask again, or after how many seconds."""
    if isinstance(error, Overloaded) and error.retry_after_s is not None:
        return error.retry_after_s
    return isinstance(error, Unavailable)
