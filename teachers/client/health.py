"""The replicas of one teacher and their health.

A replica that fails is quarantined. Trial requests are sent to it, with growing pauses, until one succeeds. A replica
that turns out to be another teacher is banned. The teacher is lost only if no replica has responded for
`unavailable_timeout_s`.
"""

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from copy import copy

from teachers.client.addresses import TeacherAddress, follow_urls, resolve_urls
from teachers.client.background_tasks import BackgroundTasks
from teachers.client.events import TeacherEvent
from teachers.client.limits import backoff_s
from teachers.client.replica import MIN_TRIAL_S, ClientFactory, Replica, may_recover
from teachers.client.start_wait import REPORT_PAUSE_S, StartWait
from teachers.protocol.errors import (
    FingerprintMismatch,
    InvalidRows,
    Overloaded,
    TeacherError,
    TeacherLost,
    Unauthorized,
    Unavailable,
    VersionMismatch,
)
from teachers.protocol.messages import TeacherCard

log = logging.getLogger("tutelage.pool")
PERMANENT_FAULTS = (InvalidRows, VersionMismatch, Unauthorized)  # a restarted server would respond in the same way
MAX_PAUSE_SHARE = 0.95  # of the time until the teacher is lost; the rest is for an attempt after a longer Retry-After


class ReplicaHealth:
    """The replicas of one teacher and their states. All methods run in one event loop."""

    def __init__(
        self, address: TeacherAddress, make_client: ClientFactory, report: Callable[[TeacherEvent], None]
    ) -> None:
        self._address = address
        self._make_client = make_client
        self._report = report
        self._trial_s = max(MIN_TRIAL_S, address.timeout_s)  # a trial may wait behind requests of other clients
        self._replicas: dict[str, Replica] = {}
        self._card: TeacherCard | None = None
        self._tokenizer_files: dict[str, bytes] = {}
        self._changed = asyncio.Event()
        self._unavailable_since: float | None = None  # time of the first failure after the last response
        self._last_error = TeacherError(f"teacher {address.name}: no request was sent yet")
        self._lost: TeacherError | None = None
        self._tasks = BackgroundTasks(f"teacher {address.name}")

    @property
    def replicas(self) -> list[Replica]:
        return list(self._replicas.values())

    @property
    def healthy(self) -> list[Replica]:
        return [replica for replica in self._replicas.values() if replica.healthy]

    @property
    def card(self) -> TeacherCard:
        """The card that all replicas have."""
        assert self._card is not None, "connect first"
        return self._card

    async def connect(self) -> tuple[TeacherCard, dict[str, bytes]]:
        """Connect to the replicas. Return the card and the tokenizer files as soon as one replica is healthy.

        Waits for it up to `start_timeout_s` (start_wait.py). Other replicas that may recover are quarantined. Raises an
        error that only the user can correct at once, and the most specific one if no replica is healthy in time.
        """
        wait = StartWait(self._address.name, self._address.start_timeout_s)
        while errors := await self._connect_replicas():
            await wait.pause(errors)
        wait.end()
        if self._address.may_change:
            self._tasks.start(self._follow_address())
        return self.card, self._tokenizer_files

    async def _connect_replicas(self) -> Sequence[BaseException]:
        """Connect to all replicas. Return the errors that prevent the start: none if a replica is healthy."""
        try:
            urls = await resolve_urls(self._address)
            self._replicas = {url: self._replicas.get(url) or self._new_replica(url) for url in urls}
            results = await asyncio.gather(*map(self._connect_replica, self.replicas), return_exceptions=True)
            errors = [result for result in results if isinstance(result, BaseException)]
            if self._card is None or not self.healthy or not all(map(may_recover, errors)):
                return errors
            self._tokenizer_files = await (await self.healthy[0].client()).tokenizer_files(self._card)
        except TeacherError as error:
            return [error]
        for replica, result in zip(self.replicas, results, strict=True):
            if isinstance(result, Overloaded):
                self.pause(replica, result)
            if isinstance(result, TeacherError):
                self.quarantine(replica, result)
        return []

    def _new_replica(self, url: str) -> Replica:
        return Replica(url, self._make_client, self._address.concurrency)

    async def aclose(self) -> None:
        await self._tasks.aclose()
        for replica in self.replicas:
            await replica.aclose()

    # --- choosing a replica ---

    def pick(self, exclude: Collection[Replica] = (), extra: int = 0) -> Replica | None:
        """Return the replica with the fewest tokens in flight that accepts one more request, or None.

        `extra` is added to every concurrency limit, so that a hedged request need not wait behind other requests.
        """
        now = asyncio.get_running_loop().time()
        available = [r for r in self._replicas.values() if r.can_accept(now, extra) and r not in exclude]
        return min(available, key=lambda r: r.tokens_in_flight, default=None)

    async def acquire(self, avoid: Collection[Replica] = ()) -> Replica:
        """Return a replica that accepts a request, and wait for one if necessary.

        A replica in `avoid` is returned only if no other one is healthy. Raises the error of a lost teacher.
        """
        while True:
            if self._lost is not None:
                raise copy(self._lost)  # a copy: callers add to the message
            has_others = any(replica not in avoid for replica in self.healthy)
            if replica := self.pick(exclude=avoid if has_others else ()):
                return replica
            self._changed.clear()
            try:
                async with asyncio.timeout(self._remaining_s()):
                    await self._changed.wait()
            except TimeoutError:
                if (self._remaining_s() or 0) <= 0:
                    self._lose(self._last_error)

    # --- results of requests ---

    def notify(self) -> None:
        """Wake waiting requests: a replica may accept one now."""
        self._changed.set()

    def on_success(self, replica: Replica) -> None:
        """Record that a replica responded: the replica and the teacher are available."""
        replica.failures = 0
        self._unavailable_since = None

    def pause(self, replica: Replica, error: Overloaded) -> None:
        """Send no request to an overloaded replica during the time that it asked for, limited by MAX_PAUSE_SHARE."""
        self._record_failure(error)
        loop = asyncio.get_running_loop()
        remaining_s = self._address.unavailable_timeout_s if self._lost else self._remaining_s() or 0.0
        pause_s = min(error.retry_after_s or backoff_s(1), max(MAX_PAUSE_SHARE * remaining_s, backoff_s(1)))
        if pause_s >= REPORT_PAUSE_S and loop.time() >= replica.paused_until:
            asked_s = error.retry_after_s
            log.warning(
                "%s; no request is sent to it for %.0f s (the server asked for %.0f s)", error, pause_s, asked_s
            )
        replica.paused_until = max(replica.paused_until, loop.time() + pause_s)
        loop.call_later(pause_s, self.notify)

    def quarantine(self, replica: Replica, error: TeacherError) -> None:
        """Send only trial requests to a failed replica, until one succeeds."""
        self._record_failure(error)
        if not replica.quarantined:
            log.warning("%s; the replica is quarantined and trial requests are sent to it", error)
            replica.healthy, replica.quarantined = False, True
            replica.failures += 1
            self._tasks.start(self._recover(replica))

    def ban(self, replica: Replica, error: FingerprintMismatch) -> None:
        """Quarantine a replica that is another teacher. The teacher is lost if all its replicas are banned."""
        if not replica.banned:
            log.error("%s; no more requests are sent to this replica", error)
        replica.banned = True
        self.quarantine(replica, error)
        if all(r.banned for r in self._replicas.values()):
            self._lose(error)

    def probe(self, replica: Replica) -> None:
        """Start to check whether the process of a slow replica responds. Its requests are aborted if it does not."""
        if not replica.probing and not replica.quarantined:
            replica.probing = True
            self._tasks.start(self._ping(replica))

    # --- life cycle of a replica ---

    async def _connect_replica(self, replica: Replica) -> None:
        """Mark a replica as healthy if it responds and is the same teacher as the others. Raises TeacherError."""
        client = await replica.client()
        if self._card is None:
            card = await client.card()
            self._card = self._card or card  # another replica may have been faster
        await client.check(self._card, self._trial_s)
        replica.healthy = True

    async def _recover(self, replica: Replica) -> None:
        """Send trial requests until one succeeds. Close the replica if the address does not contain it any more."""
        try:
            await self._send_trials(replica)
        finally:
            if self._replicas.get(replica.url) is not replica:
                await replica.drain()

    async def _send_trials(self, replica: Replica) -> None:
        while self._replicas.get(replica.url) is replica:
            paused_s = replica.paused_until - asyncio.get_running_loop().time()
            await asyncio.sleep(max(backoff_s(replica.failures), paused_s))
            try:
                await replica.send_trial(self.card, self._trial_s)
            except FingerprintMismatch as error:
                self.ban(replica, error)
            except TeacherError as error:
                self._on_failed_trial(replica, error)
            except Exception as error:  # without its trials the replica would never be used again
                log.exception("a trial of %s failed unexpectedly; it is tried again", replica.url)
                self._record_failure(TeacherError(f"teacher {self._address.name} at {replica.url}: {error!r}"))
            else:
                self._restore(replica)
                return
            replica.failures += 1

    def _restore(self, replica: Replica) -> None:
        log.warning("teacher %s at %s is healthy again", self._address.name, replica.url)
        replica.limiter.reset()
        replica.paused_until = 0.0
        replica.healthy, replica.quarantined, replica.banned = True, False, False
        if self._lost is not None and self._address.on_unavailable == "drop":
            self._lost = self._unavailable_since = None
            log.error("teacher %s joins again", self._address.name)
            detail = f"{replica.url} is healthy again"
            self._report(TeacherEvent("teacher_joined", self._address.name, detail))
        self.notify()

    async def _ping(self, replica: Replica) -> None:
        try:
            await replica.ping()
        except Unavailable as error:
            self.quarantine(replica, error)
            replica.abort_requests()
        except TeacherError:
            pass  # any response shows that the process is alive
        finally:
            replica.probing = False

    async def _follow_address(self) -> None:
        """Add new replicas and remove those that the address does not contain any more."""
        async for urls in follow_urls(self._address):
            for url in [url for url in self._replicas if url not in urls]:
                log.warning("teacher %s at %s was removed", self._address.name, url)
                removed = self._replicas.pop(url)
                if not removed.quarantined:  # otherwise _recover closes it
                    self._tasks.start(removed.drain())
            for url in [url for url in urls if url not in self._replicas]:
                log.warning("teacher %s at %s was added", self._address.name, url)
                replica = self._replicas[url] = self._new_replica(url)
                replica.quarantined = True
                self._tasks.start(self._recover(replica))

    # --- a lost teacher ---

    def _record_failure(self, error: TeacherError) -> None:
        self._last_error = error
        if self._unavailable_since is None:
            self._unavailable_since = asyncio.get_running_loop().time()
            self.notify()  # waiting requests start their timeout

    def _remaining_s(self) -> float | None:
        """Seconds until the teacher is lost; None if it is available."""
        if self._unavailable_since is None:
            return None
        return self._unavailable_since + self._address.unavailable_timeout_s - asyncio.get_running_loop().time()

    def _on_failed_trial(self, replica: Replica, error: TeacherError) -> None:
        """Declare the teacher lost if on_unavailable is `stop`, or if its only replica has a permanent fault.

        Invalid rows count as permanent, because the model produces them. A malformed response can be a transient fault
        of the server or of a proxy.
        """
        if isinstance(error, Overloaded):
            self.pause(replica, error)
        else:
            self._record_failure(error)
        only_replica_invalid = len(self._replicas) == 1 and isinstance(error, PERMANENT_FAULTS)
        if not self.healthy and (self._address.on_unavailable == "stop" or only_replica_invalid):
            self._lose(error)

    def _lose(self, error: TeacherError) -> None:
        if self._lost is None:
            self._lost = TeacherLost(str(error)) if self._address.on_unavailable == "drop" else error
            log.error("teacher %s is lost: %s", self._address.name, error)
            self._report(TeacherEvent("teacher_lost", self._address.name, str(error)))
            if self._address.on_unavailable == "drop":
                for replica in self.healthy:  # overloaded all the time: only a trial can let the teacher join again
                    self.quarantine(replica, error)
            self.notify()
