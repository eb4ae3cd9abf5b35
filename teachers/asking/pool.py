"""All teachers of a run, asked by name. A teacher is a Fleet (fleet.py), a server process a Replica (replica.py)."""

import asyncio
from collections.abc import Callable, Sequence

from teachers.asking.address import TeacherAddress
from teachers.asking.client import Client, find_client
from teachers.asking.fleet import Fleet, FleetStats
from teachers.asking.replica import Finder
from teachers.asking.roster import Event
from teachers.protocol import Card, ScoreRequest
from teachers.rows import Rows


class TeacherPool:
    """Use as an async context manager, inside one event loop. `report` hears of teachers lost and back."""

    def __init__(self, addresses: Sequence[TeacherAddress], report: Callable[[Event], None] = lambda _: None) -> None:
        self._fleets = {address.name: Fleet(address, _finder(address), report) for address in addresses}

    async def __aenter__(self) -> "TeacherPool":
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(fleet.aclose() for fleet in self._fleets.values()))

    async def connect(self, name: str) -> tuple[Card, dict[str, bytes]]:
        """The teacher's card and its tokenizer's files; see Fleet.connect."""
        return await self._fleets[name].connect()

    async def score(self, name: str, sequence: list[int], start: int, top_k: int, sample: str = "") -> Rows:
        """One teacher's rows for positions start … of one sequence; see Fleet.score."""
        request = ScoreRequest(sequences=[sequence], starts=[start], top_k=top_k)
        return await self._fleets[name].score(request, sample)

    def stats(self) -> dict[str, FleetStats]:
        """By teacher."""
        return {name: fleet.stats for name, fleet in self._fleets.items()}


def _finder(address: TeacherAddress) -> Finder:
    async def find(url: str) -> Client:
        if url.startswith("serve://"):
            from teachers.asking.handle import HandleClient  # ray, only for who has it

            return HandleClient(address.name, url, address.key)
        return await find_client(address.name, url, address.key, address.ca_file, address.tokenizer)

    return find
