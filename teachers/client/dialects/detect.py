"""Detect the dialect of a replica."""

import pkgutil
from contextlib import suppress
from urllib.parse import urlsplit

from teachers.client.dialects import DIALECTS
from teachers.client.dialects.base import Dialect, ReplicaAddress, ReplicaClient
from teachers.protocol.errors import NotDeployed, TeacherError


async def detect_dialect(address: ReplicaAddress) -> Dialect:
    """Return the dialect that the address names, else the first one in DIALECTS that accepts the replica.

    Raises TeacherError if none does, or if the address sets a key that the dialect does not use, and Unavailable if the
    server does not respond. A Ray Serve proxy may have an application for the routes of one dialect only: NotDeployed
    is raised if no dialect accepts the replica.
    """
    not_deployed: NotDeployed | None = None
    undecided: list[Dialect] = []
    for name in [address.dialect] if address.dialect else DIALECTS:
        dialect: Dialect = pkgutil.resolve_name(DIALECTS[name])()
        try:
            if await dialect.accepts(address):
                dialect = await _first_accepting(undecided, address) or dialect
                _reject_unused_keys(dialect, address)
                return dialect
        except NotDeployed as error:
            not_deployed = not_deployed or error
            undecided.append(dialect)
    if not_deployed is not None:
        raise not_deployed
    if address.dialect:
        raise TeacherError(
            f"teacher {address.teacher} at {address.url}: the server does not use the dialect {address.dialect}: "
            f"correct or remove teachers.{address.teacher}.dialect"
        )
    raise TeacherError(
        f"teacher {address.teacher} at {address.url}: the address is not that of a teacher (known dialects: "
        f"{', '.join(DIALECTS)}); {_advice(address.url)}"
    )


def _reject_unused_keys(dialect: Dialect, address: ReplicaAddress) -> None:
    for key, reason in dialect.unused_keys.items():
        if (value := getattr(address, key)) is not None:
            name = address.teacher
            raise TeacherError(f"teacher {name} at {address.url} {reason}: remove teachers.{name}.{key} ({value})")


async def _first_accepting(dialects: list[Dialect], address: ReplicaAddress) -> Dialect | None:
    """Ask dialects again that found no application: it may have been deployed meanwhile. Return the first to accept."""
    for dialect in dialects:
        with suppress(NotDeployed):
            if await dialect.accepts(address):
                return dialect
    return None


def _advice(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme in ("http", "https") and parts.path.strip("/"):
        return (
            f"it has no teacher below {parts.path}: if no reverse proxy serves the teacher there, write "
            f"{parts.scheme}://{parts.netloc}"
        )
    return "start one with `tutelage serve MODEL` and use its address, http://HOST:PORT"


async def connect_replica(address: ReplicaAddress) -> ReplicaClient:
    """Return a client of the replica in its dialect; close it when done. Raises the errors of detect_dialect."""
    return (await detect_dialect(address)).client(address)
