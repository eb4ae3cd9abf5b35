"""All teachers of a run. Each teacher has a LoadBalancer (load_balancer.py) over its replicas (replica.py)."""

import asyncio
from collections.abc import Callable, Sequence

from teachers.client.addresses import TeacherAddress
from teachers.client.dialects.base import ReplicaAddress, ReplicaClient
from teachers.client.dialects.detect import connect_replica
from teachers.client.events import TeacherEvent
from teachers.client.load_balancer import LoadBalancer, LoadBalancerStats
from teachers.client.replica import ClientFactory
from teachers.protocol.messages import ScoreRequest, TeacherCard
from teachers.protocol.rows import Rows


class TeacherPool:
    """The teachers of a run by name. An async context manager for one event loop.

    `report` is called when a teacher is lost or joins again.
    """

    def __init__(
        self, addresses: Sequence[TeacherAddress], report: Callable[[TeacherEvent], None] = lambda _: None
    ) -> None:
        self._balancers = {
            address.name: LoadBalancer(address, _client_factory(address), report) for address in addresses
        }

    async def __aenter__(self) -> "TeacherPool":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections."""
        await asyncio.gather(*(balancer.aclose() for balancer in self._balancers.values()))

    async def connect(self, name: str) -> tuple[TeacherCard, dict[str, bytes]]:
        """Return the teacher's card and its tokenizer files by name. Raises TeacherError; see ReplicaHealth.connect."""
        return await self._balancers[name].connect()

    async def score(self, name: str, sequence: list[int], start: int, top_k: int, sample: str = "") -> Rows:
        """Return one teacher's rows for positions start … of one sequence; see LoadBalancer.score."""
        request = ScoreRequest(sequences=[sequence], starts=[start], top_k=top_k)
        return await self._balancers[name].score(request, sample)

    def stats(self) -> dict[str, LoadBalancerStats]:
        """Return the statistics of every teacher by name."""
        return {name: balancer.stats for name, balancer in self._balancers.items()}


def _client_factory(address: TeacherAddress) -> ClientFactory:
    async def connect(url: str) -> ReplicaClient:
        return await connect_replica(
            ReplicaAddress(
                address.name,
                url,
                address.key,
                address.ca_file,
                address.tokenizer,
                dialect=address.dialect,
                model=address.model,
            )
        )

    return connect
