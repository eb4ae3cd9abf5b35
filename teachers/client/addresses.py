"""The address of a teacher: a list of replicas, a file that may change during a run, and DNS names.

`http://host:8101` is one replica. `dns+http://host:8101` is one replica for every address to which the name resolves.
`serve://NAME` is a Ray Serve application, reached by handle from inside its cluster. A file contains one such address
per line; blank lines and lines that start with # are ignored.
"""

import asyncio
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

from teachers.protocol.errors import TeacherError, Unavailable

DNS = "dns+"


@dataclass(frozen=True)
class TeacherAddress:
    """The replicas of a teacher and how to send requests to them.

    urls                   one per replica; dns+http://… for one per address of a name
    urls_file              file with further addresses, read again during the run
    key                    bearer key, None for an open teacher
    ca_file                certificates to trust besides the system's
    tokenizer              directory with tokenizer.json, for a server that provides none
    dialect                name in DIALECTS; None to detect it
    model                  name of the model, for a server of several
    timeout_s              total time for one request
    unavailable_timeout_s  time without a healthy replica after which the teacher is lost
    on_unavailable         `wait`: a lost teacher ends the run; `drop`: the run continues without it; `stop`: the run
                           ends as soon as no replica is healthy
    concurrency            largest number of concurrent requests per replica; the actual number is adapted
    tokens_per_minute      largest number of tokens sent in any minute; None for no limit
    """

    name: str
    urls: tuple[str, ...] = ()
    urls_file: Path | None = None
    key: str | None = field(default=None, repr=False)
    ca_file: Path | None = None
    tokenizer: Path | None = None
    dialect: str | None = None
    model: str | None = None
    timeout_s: float = 120.0
    unavailable_timeout_s: float = 600.0
    on_unavailable: Literal["wait", "drop", "stop"] = "wait"
    concurrency: int = 32
    tokens_per_minute: int | None = None

    @property
    def may_change(self) -> bool:
        """Whether resolve_urls may return other replicas later."""
        return self.urls_file is not None or any(url.startswith(DNS) for url in self.urls)


async def resolve_urls(address: TeacherAddress) -> list[str]:
    """Return the addresses of all current replicas, without duplicates, in order.

    Raises TeacherError for an unreadable file, an empty list or a password in an address, and Unavailable for a DNS
    name without an address.
    """
    name, file = address.name, address.urls_file
    lines = [*address.urls, *(await asyncio.to_thread(_read_lines, name, file) if file else [])]
    urls: dict[str, None] = {}
    for line in lines:
        reject_credentials(name, line)
        urls.update(dict.fromkeys(await _resolve_dns(name, line) if line.startswith(DNS) else [line]))
    if not urls:
        raise TeacherError(f"teacher {name}: {file or 'urls'} contains no replica; expected one address per line")
    return list(urls)


def reject_credentials(name: str, url: str) -> None:
    """Raise TeacherError if an address contains a user or a password, because messages and reports show addresses."""
    if "@" in url:
        raise TeacherError(
            f"teacher {name}: the address …@{url.rpartition('@')[2]} contains a user or password: remove it, and name "
            "the bearer key with key_file or key_env"
        )


def _read_lines(name: str, file: Path) -> list[str]:
    try:
        text = file.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TeacherError(f"teacher {name}: cannot read the list of replicas {file}: {error}") from error
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


async def _resolve_dns(name: str, url: str) -> list[str]:
    parts = urlsplit(url.removeprefix(DNS))
    if parts.scheme != "http" or not parts.hostname:  # not https: a certificate is for the name, not for its addresses
        raise TeacherError(f"teacher {name}: expected dns+http://HOST:PORT, received {url!r}")
    loop = asyncio.get_running_loop()
    try:
        infos = await loop.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
    except OSError as error:
        raise Unavailable(f"teacher {name}: {parts.hostname} has no address now ({error.strerror})") from error
    hosts = sorted({str(info[4][0]) for info in infos})
    port = f":{parts.port}" if parts.port else ""
    return [
        urlunsplit((parts.scheme, (f"[{host}]" if ":" in host else host) + port, parts.path, "", "")) for host in hosts
    ]
