"""One replica as its fleet sees it: what it is trusted with, and what is under way there."""

import asyncio
from collections.abc import Awaitable, Callable

from teachers.asking.client import Client
from teachers.asking.pacing import Pace
from teachers.errors import TeacherError, Unavailable
from teachers.protocol import Card, ScoreRequest
from teachers.rows import Rows

ALIVE_S = 5.0
TRY_OUT_S = 30.0
Finder = Callable[[str], Awaitable[Client]]


class Replica:
    """An address, and a client once something has answered there.

    serving       it is asked
    resting       it failed, and is being tried out until it serves again
    suspected     it is being looked at whether the process still lives
    refused       it answers, but is not the teacher that it was
    failures      in a row, since its last answer
    paused_until  it asked not to be asked before, in seconds of the event loop's clock
    """

    def __init__(self, url: str, find: Finder, most_at_once: int) -> None:
        self.url = url
        self._find = find
        self._client: Client | None = None
        self.pace = Pace(most_at_once)
        self.serving = self.resting = self.suspected = self.refused = False
        self.failures = 0
        self.paused_until = 0.0
        self.num_held = self.held_tokens = 0
        self._under_way: set[asyncio.Task[list[Rows]]] = set()

    async def client(self) -> Client:
        """Find out what speaks there, once. Raises TeacherError."""
        if self._client is None:
            self._client = await self._find(self.url)
        return self._client

    def takes(self, now: float, beyond: int = 0) -> bool:
        """Whether it may be asked one more question, or so many beyond what it sustains."""
        return self.serving and now >= self.paused_until and self.num_held < self.pace.limit + beyond

    def hold(self, tokens: int) -> None:
        """Keep a place for a question; `release` gives it back."""
        self.num_held += 1
        self.held_tokens += tokens

    def release(self, tokens: int) -> None:
        self.num_held -= 1
        self.held_tokens -= tokens

    async def score(self, request: ScoreRequest, card: Card, timeout_s: float) -> Rows:
        """Ask. Raises Unavailable, too, when the replica is given up in the meantime."""
        client = await self.client()
        task = asyncio.create_task(client.score(request, card, timeout_s))
        self._under_way.add(task)
        try:
            return (await task)[0]
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise
            raise Unavailable(f"the answer of {self.url} was given up: the replica is gone") from None
        finally:
            self._under_way.discard(task)

    async def alive(self) -> None:
        """Raises Unavailable if the process does not even say that it is there."""
        await (await self.client()).alive(ALIVE_S)

    async def try_out(self, card: Card, timeout_s: float) -> None:
        """Return if it is the teacher of this card and answers a small question with sense. Raises TeacherError."""
        client = await self.client()
        await client.check(card, timeout_s)
        sequence = [card.bos_id or 0, *range(min(7, card.vocab_size))]
        request = ScoreRequest(sequences=[sequence], starts=[1], top_k=min(16, card.max_top_k))
        await client.score(request, card, timeout_s)

    def give_up(self) -> None:
        """Everything that is under way there fails now."""
        for task in self._under_way:
            task.cancel()

    async def finish(self) -> None:
        """Close once nothing is under way any more."""
        await asyncio.gather(*self._under_way, return_exceptions=True)
        await self.aclose()

    async def aclose(self) -> None:
        if self._client is not None:
            await self._client.aclose()


def first_error(answers: list[BaseException]) -> BaseException:
    """Of several failures the one that a user can do most about: what is wrong before what is away."""
    return min(answers, key=lambda error: (isinstance(error, Unavailable), not isinstance(error, TeacherError)))
