"""The interfaces of a dialect and of the client of one replica."""

from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

from teachers.protocol.errors import NotFound
from teachers.protocol.messages import ScoreRequest, TeacherCard
from teachers.protocol.rows import Rows


@dataclass(frozen=True)
class ReplicaAddress:
    """The address of one replica.

    teacher    name of the teacher in messages
    url        address of the replica
    key        bearer key, None for an open teacher
    ca_file    certificates to trust besides the system's
    tokenizer  directory with tokenizer.json, for a server that provides none
    dialect    name in DIALECTS; None to detect it
    model      name of the model, for a server of several
    """

    teacher: str
    url: str
    key: str | None = field(default=None, repr=False)
    ca_file: Path | None = None
    tokenizer: Path | None = None
    dialect: str | None = None
    model: str | None = None

    @property
    def scheme(self) -> str:
        """The URL's scheme; "http" if there is none, so that an HTTP dialect reports the malformed address."""
        scheme, separator, _ = self.url.partition("://")
        return scheme if separator else "http"

    @property
    def is_http(self) -> bool:
        """Whether the address is that of an HTTP server."""
        return self.scheme in ("http", "https")


class ReplicaClient(Protocol):
    """The client of one replica. Raises the errors of teachers.protocol.errors, which name teacher and replica."""

    @property
    def url(self) -> str:
        """Address of the replica."""
        ...

    async def card(self) -> TeacherCard:
        """Return the properties of the teacher."""
        ...

    async def tokenizer_files(self, card: TeacherCard) -> dict[str, bytes]:
        """Return the tokenizer's files by name. Raises FingerprintMismatch if they are not those of the card."""
        ...

    async def score(self, request: ScoreRequest, card: TeacherCard, timeout_s: float) -> list[Rows]:
        """Return one Rows per sequence of the request, in its order, checked against the card."""
        ...

    async def check(self, card: TeacherCard, timeout_s: float) -> None:
        """Raise FingerprintMismatch unless the replica is the teacher of this card, or Unavailable."""
        ...

    async def ping(self, timeout_s: float) -> None:
        """Raise Unavailable unless the process responds. A busy process responds."""
        ...

    async def aclose(self) -> None:
        """Close all connections."""
        ...


class Dialect(Protocol):
    """A protocol in which a client talks to a replica.

    unused_keys  optional fields of ReplicaAddress that the dialect does not use, with the reason: the predicate of a
                 sentence about the server
    """

    unused_keys: ClassVar[Mapping[str, str]]

    async def accepts(self, address: ReplicaAddress) -> bool:
        """Return whether the replica uses this dialect, by the scheme of its address or by probing the server.

        Raises Unavailable if the server does not respond, and TeacherError if the address is invalid.
        """
        ...

    def client(self, address: ReplicaAddress) -> ReplicaClient:
        """Return a client of an accepted replica."""
        ...


async def has_route(client: ReplicaClient, probe: Callable[[], Awaitable[object]]) -> bool:
    """Return whether the server has the route that `probe` requests, and close the client."""
    async with AsyncExitStack() as stack:
        stack.push_async_callback(client.aclose)
        try:
            await probe()
        except NotFound:
            return False
        return True
