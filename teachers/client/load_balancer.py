"""Distribute the score requests of one teacher over its replicas.

A request is sent to the healthy replica with the fewest tokens in flight, within that replica's concurrency limit
(limits.py). A request that takes much longer than usual is hedged: sent to a second replica, and the first response
counts. Failed requests are retried. After an invalid response, the request is retried on every other healthy replica,
at least once. The state of the replicas is managed in health.py.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from teachers.backlog import Backlog
from teachers.client.addresses import TeacherAddress
from teachers.client.events import TeacherEvent
from teachers.client.health import ReplicaHealth
from teachers.client.limits import HedgePolicy
from teachers.client.rate_limits import TokenRateLimiter
from teachers.client.replica import ClientFactory, Replica
from teachers.protocol.errors import FingerprintMismatch, NotFound, Overloaded, ProtocolError, Unauthorized, Unavailable
from teachers.protocol.messages import ScoreRequest, TeacherCard
from teachers.protocol.rows import Rows

log = logging.getLogger("tutelage.pool")
PROBE_AFTER_S = 10.0  # a silent replica is probed after this time while the usual latency is unknown
MAX_FAILURES = 6  # of one request, half of them on one replica: then the request is at fault
REPLICA_FAULTS = (ProtocolError, Unauthorized, NotFound)  # errors for which the replica is at fault, not the request


@dataclass(frozen=True)
class LoadBalancerStats:
    """Statistics of one teacher. Counters count from the start of the run.

    requests      successful requests
    tokens        positions received
    retries       repeated requests
    hedged        requests sent to a second replica because the first one was slow
    rejected      invalid responses
    sent_tokens   tokens sent, repeated and hedged requests included
    replicas      known replicas
    healthy       healthy replicas
    concurrency   sum of the concurrency limits of the healthy replicas
    tokens_per_s  recent tokens per second with requests in flight
    """

    requests: int = 0
    tokens: int = 0
    retries: int = 0
    hedged: int = 0
    rejected: int = 0
    sent_tokens: int = 0
    replicas: int = 0
    healthy: int = 0
    concurrency: int = 0
    tokens_per_s: float = 0.0


@dataclass(frozen=True)
class _PendingRequest:
    """A request, the name of its sample for messages, and the replicas whose response to it was invalid."""

    request: ScoreRequest
    sample: str
    rejected_by: list[Replica] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return len(self.request.sequences[0])


class LoadBalancer:
    """All replicas of one teacher, for one event loop. `report` is called when the teacher is lost or joins again."""

    def __init__(
        self, address: TeacherAddress, make_client: ClientFactory, report: Callable[[TeacherEvent], None]
    ) -> None:
        self._health = ReplicaHealth(address, make_client, report)
        self._timeout_s = address.timeout_s
        self._order = asyncio.Lock()  # requests acquire replicas in the order of their arrival
        self._hedging = HedgePolicy()
        self._backlog = Backlog()
        self._rate = TokenRateLimiter(address.tokens_per_minute)
        self._counts = {"requests": 0, "tokens": 0, "retries": 0, "hedged": 0, "rejected": 0, "sent_tokens": 0}

    @property
    def stats(self) -> LoadBalancerStats:
        """Current statistics."""
        healthy = self._health.healthy
        return LoadBalancerStats(
            **self._counts,
            replicas=len(self._health.replicas),
            healthy=len(healthy),
            concurrency=sum(replica.limiter.limit for replica in healthy),
            tokens_per_s=self._backlog.tokens_per_s,
        )

    async def connect(self) -> tuple[TeacherCard, dict[str, bytes]]:
        """Return the teacher's card and its tokenizer files; see ReplicaHealth.connect."""
        return await self._health.connect()

    async def aclose(self) -> None:
        await self._health.aclose()

    async def score(self, request: ScoreRequest, sample: str = "") -> Rows:
        """Return the rows of one sequence. `sample` names it in messages.

        Raises TeacherLost if the teacher is dropped, Rejected without a retry, ProtocolError if every healthy replica
        sends an invalid response, and the last Unavailable if the teacher is lost or only this request keeps failing.
        """
        pending, finished = _PendingRequest(request, sample), False
        self._hedging.on_request()
        self._backlog.enter(pending.tokens)
        try:
            rows = await self._score_with_retries(pending)
            finished = True
        finally:
            self._backlog.leave(pending.tokens, finished)
        self._counts["requests"] += 1
        self._counts["tokens"] += len(rows)
        return rows

    async def _score_with_retries(self, pending: _PendingRequest) -> Rows:
        failures: Counter[Replica] = Counter()
        while True:
            async with self._order:
                await self._rate.wait(pending.tokens)
                replica = await self._health.acquire(pending.rejected_by)
                replica.acquire(pending.tokens)
            try:
                return await self._score_with_hedge(replica, pending)
            except (Overloaded, FingerprintMismatch):
                pass  # the request is not at fault; _attempt has paused or banned the replica
            except Unavailable:
                failures[replica] += 1
                if failures.total() >= MAX_FAILURES and failures[replica] >= MAX_FAILURES // 2:
                    raise
            except REPLICA_FAULTS:
                untried = [replica for replica in self._health.healthy if replica not in pending.rejected_by]
                if (len(pending.rejected_by) > 1 and not untried) or len(pending.rejected_by) >= MAX_FAILURES:
                    raise
            self._counts["retries"] += 1

    async def _score_with_hedge(self, replica: Replica, pending: _PendingRequest) -> Rows:
        """Send the request to a replica, and to a second one if it is slow. Return the first response."""
        first = self._start_attempt(replica, pending)
        attempts = {first}
        try:
            delay_s = self._hedging.delay_s(pending.tokens)
            done, _ = await asyncio.wait(attempts, timeout=delay_s or PROBE_AFTER_S)
            if not done:
                self._health.probe(replica)
                if delay_s and (second := self._hedge_replica(replica)):
                    second.acquire(pending.tokens)
                    attempts.add(self._start_attempt(second, pending))
            while True:
                done, attempts = await asyncio.wait(attempts, return_when=asyncio.FIRST_COMPLETED)
                succeeded = [task for task in done if task.exception() is None]
                if succeeded and first in attempts:
                    replica.limiter.on_overload()  # the second replica was faster
                if succeeded or not attempts:
                    return (succeeded or list(done))[0].result()
        finally:
            for task in attempts:
                task.cancel()
            await asyncio.gather(*attempts, return_exceptions=True)

    def _hedge_replica(self, first: Replica) -> Replica | None:
        if self._rate.is_limited:  # a hedged request spends tokens twice
            return None
        second = self._health.pick(exclude=[first], extra=1)
        if second is None or not self._hedging.take_credit():
            return None
        self._counts["hedged"] += 1
        return second

    def _start_attempt(self, replica: Replica, pending: _PendingRequest) -> asyncio.Task[Rows]:
        """Send the request to an acquired replica, and release the replica when the attempt ends."""

        def release(_: object) -> None:
            replica.release(pending.tokens)
            self._health.notify()

        attempt = asyncio.create_task(self._attempt(replica, pending))
        attempt.add_done_callback(release)
        return attempt

    async def _attempt(self, replica: Replica, pending: _PendingRequest) -> Rows:
        """Send the request to one replica, update the state of the replica, and return the rows."""
        loop = asyncio.get_running_loop()
        began, in_flight = loop.time(), replica.in_flight
        self._counts["sent_tokens"] += pending.tokens
        try:
            rows = await replica.score(pending.request, self._health.card, self._timeout_s)
        except Overloaded as error:
            replica.limiter.on_overload()
            self._health.pause(replica, error)
            raise
        except FingerprintMismatch as error:
            self._health.ban(replica, error)
            raise
        except Unavailable as error:
            replica.limiter.on_overload()
            self._health.quarantine(replica, error)
            raise
        except REPLICA_FAULTS as error:
            log.error("%s (sample %s): the response is rejected", error, pending.sample)
            self._counts["rejected"] += 1
            pending.rejected_by.append(replica)
            self._health.quarantine(replica, error)
            raise
        replica.limiter.on_success(loop.time() - began, pending.tokens, in_flight)
        self._hedging.on_success(loop.time() - began, pending.tokens)
        self._health.on_success(replica)
        return rows
