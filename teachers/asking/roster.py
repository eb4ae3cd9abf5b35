"""Which replicas of a teacher there are, which of them are trusted, and whether the teacher is lost.

A replica that fails rests, is tried out with a real question, and serves again. One that answers as another teacher
than it was is refused. Only when nothing has come from any of them for `patience_s` is the teacher lost.
"""

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal

from teachers.asking.address import TeacherAddress, find_replicas
from teachers.asking.pacing import backoff_s
from teachers.asking.replica import TRY_OUT_S, Finder, Replica, first_error
from teachers.errors import (
    FingerprintMismatch,
    Overloaded,
    ProtocolError,
    TeacherError,
    TeacherLost,
    Unauthorized,
    Unavailable,
)
from teachers.protocol import Card

log = logging.getLogger("tutelage.pool")
LOOK_AGAIN_S = 10.0  # between two readings of a file or a name that lists replicas


@dataclass(frozen=True)
class Event:
    """A teacher was lost, or joined again."""

    kind: Literal["teacher_lost", "teacher_joined"]
    teacher: str
    detail: str


class Roster:
    """The replicas of one teacher. Made and closed inside one event loop."""

    def __init__(self, address: TeacherAddress, find: Finder, report: Callable[[Event], None]) -> None:
        self._address = address
        self._find = find
        self._report = report
        self._trial_s = max(TRY_OUT_S, address.timeout_s)  # a trial may wait behind the answers of other clients
        self._replicas: dict[str, Replica] = {}
        self._card: Card | None = None
        self._changed = asyncio.Event()
        self._silent_since: float | None = None  # first failure after the last answer
        self._last_error = TeacherError(f"teacher {address.name}: not asked yet")
        self._lost: TeacherError | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def replicas(self) -> list[Replica]:
        return list(self._replicas.values())

    @property
    def serving(self) -> list[Replica]:
        return [replica for replica in self._replicas.values() if replica.serving]

    @property
    def card(self) -> Card:
        """What every replica is."""
        assert self._card is not None, "connect first"
        return self._card

    async def connect(self) -> tuple[Card, dict[str, bytes]]:
        """The card that every replica must have, and the tokenizer's files.

        Raises FingerprintMismatch if two replicas differ, and the first error if none answers.
        """
        for url in await find_replicas(self._address):
            self._replicas[url] = Replica(url, self._find, self._address.concurrency)
        answers = await asyncio.gather(*map(self._meet, self.replicas), return_exceptions=True)
        errors = [answer for answer in answers if isinstance(answer, BaseException)]
        if self._card is None or not self.serving or not all(isinstance(error, Unavailable) for error in errors):
            raise first_error(errors)
        for replica, answer in zip(self.replicas, answers, strict=True):
            if isinstance(answer, Unavailable):
                self.rest(replica, answer)
        if self._address.may_change:
            self._start(self._look_again())
        return self._card, await (await self.serving[0].client()).tokenizer_files(self._card)

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for replica in self.replicas:
            await replica.aclose()

    # --- for whoever wants to ask ---

    def free(self, besides: Collection[Replica] = (), beyond: int = 0) -> Replica | None:
        """The replica with the fewest tokens under way among those that take one more question.

        With `beyond`, as many more than each sustains: for a question that is late elsewhere, before all that wait.
        """
        now = asyncio.get_running_loop().time()
        free = [r for r in self._replicas.values() if r.takes(now, beyond) and r not in besides]
        return min(free, key=lambda r: r.held_tokens, default=None)

    async def wait(self, distrusted: Collection[Replica] = ()) -> Replica:
        """The next free replica, a distrusted one only if no other serves. Raises what the teacher was lost by."""
        while True:
            if self._lost is not None:
                raise copy(self._lost)  # each question adds its own words to it
            others_serve = any(replica not in distrusted for replica in self.serving)
            if replica := self.free(besides=distrusted if others_serve else ()):
                return replica
            self._changed.clear()
            try:
                async with asyncio.timeout(self._patience_left()):
                    await self._changed.wait()
            except TimeoutError:
                if (self._patience_left() or 0) <= 0:
                    self._lose(self._last_error)

    # --- what came of asking ---

    def changed(self) -> None:
        """A place may be free: who waits looks again."""
        self._changed.set()

    def answered(self, replica: Replica) -> None:
        replica.failures = 0
        self._silent_since = None

    def overloaded(self, replica: Replica, error: Overloaded) -> None:
        """It asked to be left alone for a while."""
        loop = asyncio.get_running_loop()
        pause_s = error.retry_after_s or backoff_s(1)
        replica.paused_until = loop.time() + pause_s
        loop.call_later(pause_s, self.changed)
        self._silent(error)

    def rest(self, replica: Replica, error: TeacherError) -> None:
        """It failed: leave it alone, and try it out until it is itself again."""
        self._silent(error)
        if not replica.resting:
            log.warning("%s; it rests and is tried again", error)
            replica.serving, replica.resting = False, True
            replica.failures += 1
            self._start(self._recover(replica))

    def refuse(self, replica: Replica, error: FingerprintMismatch) -> None:
        """It is not the teacher that it was."""
        if not replica.refused:
            log.error("%s; it is not asked any more", error)
        replica.refused = True
        self.rest(replica, error)
        if all(r.refused for r in self._replicas.values()):
            self._lose(error)

    def suspect(self, replica: Replica) -> None:
        """It is slow: if its process does not answer at all, give up what is under way there."""
        if not replica.suspected and not replica.resting:
            replica.suspected = True
            self._start(self._look_into(replica))

    # --- a replica comes, goes and comes back ---

    async def _meet(self, replica: Replica) -> None:
        """Take a replica in that answers and is the teacher that the others are."""
        client = await replica.client()
        if self._card is None:
            card = await client.card()
            self._card = self._card or card
        await client.check(self._card, self._trial_s)
        replica.serving = True

    async def _recover(self, replica: Replica) -> None:
        """Try it out until it is itself again, or is not listed any more."""
        while self._replicas.get(replica.url) is replica:
            await asyncio.sleep(backoff_s(replica.failures))
            try:
                await replica.try_out(self.card, self._trial_s)
            except FingerprintMismatch as error:
                self.refuse(replica, error)
            except TeacherError as error:
                self._failed_again(error)
            else:
                self._serve(replica)
                return
            replica.failures += 1
        await replica.finish()

    def _serve(self, replica: Replica) -> None:
        log.warning("teacher %s at %s answers again", self._address.name, replica.url)
        replica.pace.restart()
        replica.serving, replica.resting, replica.refused = True, False, False
        if self._lost is not None and self._address.on_loss == "drop":
            self._lost = self._silent_since = None
            log.error("teacher %s is back", self._address.name)
            self._report(Event("teacher_joined", self._address.name, f"{replica.url} answers again"))
        self.changed()

    async def _look_into(self, replica: Replica) -> None:
        try:
            await replica.alive()
        except Unavailable as error:
            self.rest(replica, error)
            replica.give_up()
        except TeacherError:
            pass  # whatever it says, it lives
        finally:
            replica.suspected = False

    async def _look_again(self) -> None:
        """Find new replicas, and let those go that are not listed any more."""
        while True:
            await asyncio.sleep(LOOK_AGAIN_S)
            try:
                urls = await find_replicas(self._address)
            except TeacherError as error:
                log.warning("%s; the replicas stay as they are", error)
                continue
            for url in [url for url in self._replicas if url not in urls]:
                log.warning("teacher %s at %s is not listed any more", self._address.name, url)
                gone = self._replicas.pop(url)
                if not gone.resting:  # else its trials end and close it
                    self._start(gone.finish())
            for url in [url for url in urls if url not in self._replicas]:
                log.warning("teacher %s at %s is new", self._address.name, url)
                replica = self._replicas[url] = Replica(url, self._find, self._address.concurrency)
                replica.resting = True
                self._start(self._recover(replica))

    # --- the teacher is lost ---

    def _silent(self, error: TeacherError) -> None:
        self._last_error = error
        if self._silent_since is None:
            self._silent_since = asyncio.get_running_loop().time()
            self.changed()  # who waits begins to count

    def _patience_left(self) -> float | None:
        if self._silent_since is None:
            return None
        return self._silent_since + self._address.patience_s - asyncio.get_running_loop().time()

    def _failed_again(self, error: TeacherError) -> None:
        """A trial failed: the end for `stop` if none serves, and for a single replica that is there and no use."""
        self._silent(error)
        alone_and_no_use = len(self._replicas) == 1 and isinstance(error, (ProtocolError, Unauthorized))
        if not self.serving and (self._address.on_loss == "stop" or alone_and_no_use):
            self._lose(error)

    def _lose(self, error: TeacherError) -> None:
        if self._lost is None:
            self._lost = TeacherLost(str(error)) if self._address.on_loss == "drop" else error
            log.error("teacher %s is lost: %s", self._address.name, error)
            self._report(Event("teacher_lost", self._address.name, str(error)))
            if self._address.on_loss == "drop":
                for replica in self.serving:  # busy all the time: only a trial can bring the teacher back
                    self.rest(replica, error)
            self.changed()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
