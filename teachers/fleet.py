"""The replicas of one teacher, asked as if they were one.

A question goes to the replica with the fewest tokens under way, and at most as many go there at once as it sustains
(pacing.py). A straggler is asked a second time elsewhere, and the first answer counts. A replica that fails rests, is
tried out, and begins again with one question; what was under way there is asked again. Only when no replica has
answered for `patience_s` is the teacher lost.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal

from teachers.address import TeacherAddress, find_replicas
from teachers.errors import FingerprintMismatch, Overloaded, ProtocolError, TeacherError, TeacherLost, Unavailable
from teachers.pacing import Stragglers, backoff_s
from teachers.protocol import Card, ScoreRequest
from teachers.replica import TRY_OUT_S, Finder, Replica, first_error
from teachers.rows import Rows

log = logging.getLogger("tutelage.pool")
LOOK_AGAIN_S = 10.0  # between two readings of a file or a name that lists replicas
SUSPECT_S = 10.0  # after which silence is looked into while nothing is known of this teacher's usual latency
MOST_FAILURES = 6  # of one question: it is the question then


@dataclass(frozen=True)
class Event:
    """A teacher was lost, or joined again."""

    kind: Literal["teacher_lost", "teacher_joined"]
    teacher: str
    detail: str


@dataclass(frozen=True)
class FleetStats:
    """Counts since the beginning, and how many replicas serve now."""

    questions: int = 0
    tokens: int = 0
    asked_again: int = 0
    hedged: int = 0
    rejected: int = 0
    replicas: int = 0
    serving: int = 0
    at_once: int = 0


class Fleet:
    """One teacher. Made and closed inside one event loop."""

    def __init__(self, address: TeacherAddress, find: Finder, report: Callable[[Event], None]) -> None:
        self.address = address
        self._find = find
        self._report = report
        self._replicas: dict[str, Replica] = {}
        self._card: Card | None = None
        self._stragglers = Stragglers()
        self._turn = asyncio.Lock()  # questions are given to replicas in the order in which they came
        self._changed = asyncio.Event()
        self._silent_since: float | None = None  # first failure after the last answer
        self._lost: TeacherError | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._counts = {"questions": 0, "tokens": 0, "asked_again": 0, "hedged": 0, "rejected": 0}

    @property
    def card(self) -> Card:
        assert self._card is not None, "connect first"
        return self._card

    @property
    def absent(self) -> bool:
        """Whether the teacher is lost."""
        return self._lost is not None

    @property
    def stats(self) -> FleetStats:
        serving = [r for r in self._replicas.values() if r.serving]
        return FleetStats(
            **self._counts,
            replicas=len(self._replicas),
            serving=len(serving),
            at_once=sum(r.pace.limit for r in serving),
        )

    async def connect(self) -> tuple[Card, dict[str, bytes]]:
        """The card that every replica must have, and the tokenizer's files.

        Raises FingerprintMismatch if two replicas differ, and the first error if none answers.
        """
        address = self.address
        for url in await find_replicas(address):
            self._replicas[url] = Replica(url, self._find, address.concurrency)
        answers = await asyncio.gather(*map(self._meet, self._replicas.values()), return_exceptions=True)
        errors = [answer for answer in answers if isinstance(answer, BaseException)]
        if fatal := [error for error in errors if not isinstance(error, Unavailable)]:
            raise first_error(fatal)
        if self._card is None:
            raise first_error(errors)
        for replica, answer in zip(list(self._replicas.values()), answers, strict=True):
            if isinstance(answer, Unavailable):
                self._rest(replica, answer)
        if address.may_change:
            self._start(self._look_again())
        client = await next(r for r in self._replicas.values() if r.serving).client()
        return self._card, await client.tokenizer_files(self._card)

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for replica in self._replicas.values():
            await replica.aclose()

    async def score(self, request: ScoreRequest, sample: str = "") -> Rows:
        """Rows for one sequence. `sample` is what messages call it.

        Raises TeacherLost if the teacher is dropped, Rejected at once, ProtocolError if two answers in a row cannot be
        trusted, and the last Unavailable if the teacher is lost or only this question fails again and again.
        """
        self._stragglers.asked()
        failures, distrusted = 0, False
        while True:
            replica = await self._next(len(request.sequences[0]))
            try:
                rows = await self._first_of(replica, request)
            except (Overloaded, FingerprintMismatch):
                pass  # not the question's fault, and seen to where it happened
            except Unavailable:
                failures += 1
                if failures == MOST_FAILURES:
                    raise
            except ProtocolError as error:
                self._counts["rejected"] += 1
                log.error("%s (sample %s): the answer is rejected", error, sample)
                if distrusted:
                    raise
                distrusted = True
            else:
                self._counts["questions"] += 1
                self._counts["tokens"] += len(rows)
                return rows
            self._counts["asked_again"] += 1

    # --- one question ---

    async def _next(self, tokens: int) -> Replica:
        """A place at a replica, as soon as there is one."""
        async with self._turn:
            while True:
                if self._lost is not None:
                    raise copy(self._lost)  # each question adds its own words to it
                now = asyncio.get_running_loop().time()
                if replica := self._free(now):
                    replica.hold(tokens)
                    return replica
                self._changed.clear()
                try:
                    async with asyncio.timeout(self._patience_left(now)):
                        await self._changed.wait()
                except TimeoutError:
                    self._look_at_patience()

    def _free(self, now: float, besides: Replica | None = None) -> Replica | None:
        free = [r for r in self._replicas.values() if r.takes(now) and r is not besides]
        return min(free, key=lambda r: r.held_tokens) if free else None

    async def _first_of(self, replica: Replica, request: ScoreRequest) -> Rows:
        """The first answer: of this replica, or, if that is a straggler, of a second one."""
        tokens = len(request.sequences[0])
        first = asyncio.create_task(self._attempt(replica, request))
        attempts = {first}
        try:
            usual_s = self._stragglers.patience_s(tokens)
            done, _ = await asyncio.wait(attempts, timeout=usual_s or SUSPECT_S)
            if not done:
                self._start(self._suspect(replica))
                if usual_s and (second := self._second(replica)):
                    second.hold(tokens)
                    attempts.add(asyncio.create_task(self._attempt(second, request)))
            while True:
                done, attempts = await asyncio.wait(attempts, return_when=asyncio.FIRST_COMPLETED)
                answered = [task for task in done if task.exception() is None]
                if answered or not attempts:
                    return (answered or list(done))[0].result()
        finally:
            if first in attempts and not first.done():
                replica.pace.complained()  # overtaken
            for task in attempts:
                task.cancel()
            await asyncio.gather(*attempts, return_exceptions=True)

    def _second(self, first: Replica) -> Replica | None:
        second = self._free(asyncio.get_running_loop().time(), besides=first)
        if second is None or not self._stragglers.may_ask_twice():
            return None
        self._counts["hedged"] += 1
        return second

    async def _attempt(self, replica: Replica, request: ScoreRequest) -> Rows:
        """Ask one replica, and draw the consequences for it. Its place is held already, and given back here."""
        loop, tokens = asyncio.get_running_loop(), len(request.sequences[0])
        began, under_way = loop.time(), replica.num_held
        try:
            rows = await replica.score(request, self.card, self.address.timeout_s)
        except Overloaded as error:
            replica.pace.complained()
            pause_s = error.retry_after_s or backoff_s(1)
            replica.paused_until = loop.time() + pause_s
            loop.call_later(pause_s, self._changed.set)
            self._silent(error)
            raise
        except FingerprintMismatch as error:
            self._refuse(replica, error)
            raise
        except (Unavailable, ProtocolError) as error:
            replica.pace.complained()
            self._rest(replica, error)
            raise
        else:
            replica.failures = 0
            replica.pace.answered(loop.time() - began, tokens, under_way)
            self._stragglers.answered(loop.time() - began, tokens)
            self._silent_since = None
            return rows
        finally:
            replica.release(tokens)
            self._changed.set()

    # --- a replica goes and comes back ---

    async def _meet(self, replica: Replica) -> None:
        """Take a replica in that answers and is the teacher that the others are."""
        client = await replica.client()
        if self._card is None:
            card = await client.card()
            self._card = self._card or card
        await client.check(self._card, TRY_OUT_S)
        replica.serving = True

    def _rest(self, replica: Replica, error: TeacherError) -> None:
        self._silent(error)
        if not replica.resting:
            log.warning("%s; it rests and is tried again", error)
            replica.serving, replica.resting = False, True
            replica.failures += 1
            self._start(self._recover(replica))

    def _refuse(self, replica: Replica, error: FingerprintMismatch) -> None:
        if not replica.refused:
            log.error("%s; it is not asked any more", error)
        replica.refused = True
        self._rest(replica, error)
        if all(r.refused for r in self._replicas.values()):
            self._lose(error)

    async def _recover(self, replica: Replica) -> None:
        """Try it out until it is itself again."""
        while replica.url in self._replicas:
            await asyncio.sleep(backoff_s(replica.failures))
            try:
                await replica.try_out(self.card)
                break
            except FingerprintMismatch as error:
                self._refuse(replica, error)
            except TeacherError as error:
                self._gone(error)
            replica.failures += 1
        log.warning("teacher %s at %s answers again", self.address.name, replica.url)
        replica.pace.restart()
        replica.serving, replica.resting, replica.refused = True, False, False
        self._join()
        self._changed.set()

    async def _suspect(self, replica: Replica) -> None:
        """A straggler: if its process does not answer at all, give up what is under way there."""
        if replica.suspected or replica.resting:
            return
        replica.suspected = True
        try:
            await replica.alive()
        except Unavailable as error:
            self._rest(replica, error)
            replica.give_up()
        finally:
            replica.suspected = False

    async def _look_again(self) -> None:
        """Find new replicas, and let those go that are not listed any more."""
        address = self.address
        while True:
            await asyncio.sleep(LOOK_AGAIN_S)
            try:
                urls = await find_replicas(address)
            except TeacherError as error:
                log.warning("%s; the replicas stay as they are", error)
                continue
            for url in [url for url in self._replicas if url not in urls]:
                log.warning("teacher %s at %s is not listed any more", address.name, url)
                self._start(self._replicas.pop(url).finish())
            for url in [url for url in urls if url not in self._replicas]:
                log.warning("teacher %s at %s is new", address.name, url)
                self._replicas[url] = Replica(url, self._find, address.concurrency)
                self._replicas[url].resting = True
                self._start(self._recover(self._replicas[url]))

    # --- the teacher is lost and comes back ---

    def _silent(self, error: TeacherError) -> None:
        self._last_error = error
        if self._silent_since is None:
            self._silent_since = asyncio.get_running_loop().time()
            self._changed.set()  # who waits begins to count

    def _patience_left(self, now: float) -> float | None:
        return None if self._silent_since is None else self._silent_since + self.address.patience_s - now

    def _look_at_patience(self) -> None:
        left = self._patience_left(asyncio.get_running_loop().time())
        if left is not None and left <= 0:
            self._lose(self._last_error)

    def _gone(self, error: TeacherError) -> None:
        """A replica did not stand its trial: the end for `stop` if none serves, and if it is alone with nonsense."""
        self._silent(error)
        nobody_serves = not any(r.serving for r in self._replicas.values())
        alone_with_nonsense = len(self._replicas) == 1 and isinstance(error, ProtocolError)
        if nobody_serves and (self.address.on_loss == "stop" or alone_with_nonsense):
            self._lose(error)

    def _lose(self, error: TeacherError) -> None:
        if self._lost is None:
            self._lost = TeacherLost(str(error)) if self.address.on_loss == "drop" else error
            log.error("teacher %s is lost: %s", self.address.name, error)
            self._report(Event("teacher_lost", self.address.name, str(error)))
            self._changed.set()

    def _join(self) -> None:
        if self._lost is not None and self.address.on_loss == "drop":
            self._lost = self._silent_since = None
            log.error("teacher %s is back", self.address.name)
            self._report(Event("teacher_joined", self.address.name, "a replica answers again"))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
