"""One teacher, asked as if it were one process.

A question goes to the replica with the fewest tokens under way, and at most as many go there at once as it sustains
(pacing.py). A straggler is asked a second time elsewhere, and the first answer counts. What failed is asked again; an
answer that cannot be trusted is asked for once more. Which replicas there are to ask is in roster.py.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from teachers.asking.address import TeacherAddress
from teachers.asking.pacing import Stragglers
from teachers.asking.replica import Finder, Replica
from teachers.asking.roster import Event, Roster
from teachers.backlog import Backlog
from teachers.errors import FingerprintMismatch, NotFound, Overloaded, ProtocolError, Unauthorized, Unavailable
from teachers.protocol import Card, ScoreRequest
from teachers.rows import Rows

log = logging.getLogger("tutelage.pool")
SUSPECT_S = 10.0  # after which silence is looked into while nothing is known of this teacher's usual latency
MOST_FAILURES = 6  # of one question, and some replica's third among them: it is the question then
DISTRUSTED = (ProtocolError, Unauthorized, NotFound)  # the replica is at fault, not the question


@dataclass(frozen=True)
class FleetStats:
    """Counts since the beginning, how many replicas there are and serve now, and questions they take at once.

    tokens_per_s  answered lately in a second in which something was asked for
    """

    questions: int = 0
    tokens: int = 0
    asked_again: int = 0
    hedged: int = 0
    rejected: int = 0
    replicas: int = 0
    serving: int = 0
    at_once: int = 0
    tokens_per_s: float = 0.0


@dataclass(frozen=True)
class _Question:
    """What is asked, what messages call it, and the replicas whose answers to it were rejected."""

    request: ScoreRequest
    sample: str
    rejected_by: list[Replica] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return len(self.request.sequences[0])


class Fleet:
    """All replicas of one teacher. Made and closed inside one event loop; `report` hears if it is lost or back."""

    def __init__(self, address: TeacherAddress, find: Finder, report: Callable[[Event], None]) -> None:
        self._roster = Roster(address, find, report)
        self._timeout_s = address.timeout_s
        self._turn = asyncio.Lock()  # questions get their replicas in the order in which they came
        self._stragglers = Stragglers()
        self._backlog = Backlog()
        self._counts = {"questions": 0, "tokens": 0, "asked_again": 0, "hedged": 0, "rejected": 0}

    @property
    def stats(self) -> FleetStats:
        serving = self._roster.serving
        at_once = sum(replica.pace.limit for replica in serving)
        return FleetStats(
            **self._counts,
            replicas=len(self._roster.replicas),
            serving=len(serving),
            at_once=at_once,
            tokens_per_s=self._backlog.tokens_per_s,
        )

    async def connect(self) -> tuple[Card, dict[str, bytes]]:
        """The teacher's card and its tokenizer's files; see Roster.connect."""
        return await self._roster.connect()

    async def aclose(self) -> None:
        await self._roster.aclose()

    async def score(self, request: ScoreRequest, sample: str = "") -> Rows:
        """Rows for one sequence. `sample` is what messages call it.

        Raises TeacherLost if the teacher is dropped, Rejected at once, ProtocolError if a second answer cannot be
        trusted either, and the last Unavailable if the teacher is lost or only this question fails again and again.
        """
        question, answered = _Question(request, sample), False
        self._stragglers.asked()
        self._backlog.enter(question.tokens)
        try:
            rows = await self._answer(question)
            answered = True
        finally:
            self._backlog.leave(question.tokens, answered)
        self._counts["questions"] += 1
        self._counts["tokens"] += len(rows)
        return rows

    async def _answer(self, question: _Question) -> Rows:
        """Of whoever gives one, asked until somebody does."""
        failures: Counter[Replica] = Counter()
        while True:
            async with self._turn:
                replica = await self._roster.wait(question.rejected_by)
                replica.hold(question.tokens)
            try:
                return await self._first_of(replica, question)
            except (Overloaded, FingerprintMismatch):
                pass  # not the question's fault, and seen to where it happened
            except Unavailable:
                failures[replica] += 1
                if failures.total() >= MOST_FAILURES and failures[replica] >= MOST_FAILURES // 2:
                    raise
            except DISTRUSTED:
                if len(question.rejected_by) > 1:
                    raise
            self._counts["asked_again"] += 1

    async def _first_of(self, replica: Replica, question: _Question) -> Rows:
        """The first answer: of this replica, or, if that is a straggler, of a second one."""
        first = self._launch(replica, question)
        attempts = {first}
        try:
            usual_s = self._stragglers.patience_s(question.tokens)
            done, _ = await asyncio.wait(attempts, timeout=usual_s or SUSPECT_S)
            if not done:
                self._roster.suspect(replica)
                if usual_s and (second := self._second(replica)):
                    second.hold(question.tokens)
                    attempts.add(self._launch(second, question))
            while True:
                done, attempts = await asyncio.wait(attempts, return_when=asyncio.FIRST_COMPLETED)
                answered = [task for task in done if task.exception() is None]
                if answered and first in attempts:
                    replica.pace.complained()  # it was overtaken
                if answered or not attempts:
                    return (answered or list(done))[0].result()
        finally:
            for task in attempts:
                task.cancel()
            await asyncio.gather(*attempts, return_exceptions=True)

    def _second(self, first: Replica) -> Replica | None:
        second = self._roster.free(besides=[first], beyond=1)
        if second is None or not self._stragglers.may_ask_twice():
            return None
        self._counts["hedged"] += 1
        return second

    def _launch(self, replica: Replica, question: _Question) -> asyncio.Task[Rows]:
        """Ask one replica. Its place is held already, and given back whatever comes of it."""

        def leave(_: object) -> None:
            replica.release(question.tokens)
            self._roster.changed()

        attempt = asyncio.create_task(self._attempt(replica, question))
        attempt.add_done_callback(leave)
        return attempt

    async def _attempt(self, replica: Replica, question: _Question) -> Rows:
        """One replica's answer, and the consequences for that replica."""
        loop = asyncio.get_running_loop()
        began, under_way = loop.time(), replica.num_held
        try:
            rows = await replica.score(question.request, self._roster.card, self._timeout_s)
        except Overloaded as error:
            replica.pace.complained()
            self._roster.overloaded(replica, error)
            raise
        except FingerprintMismatch as error:
            self._roster.refuse(replica, error)
            raise
        except Unavailable as error:
            replica.pace.complained()
            self._roster.rest(replica, error)
            raise
        except DISTRUSTED as error:
            log.error("%s (sample %s): the answer is rejected", error, question.sample)
            self._counts["rejected"] += 1
            question.rejected_by.append(replica)
            self._roster.rest(replica, error)
            raise
        replica.pace.answered(loop.time() - began, question.tokens, under_way)
        self._stragglers.answered(loop.time() - began, question.tokens)
        self._roster.answered(replica)
        return rows
