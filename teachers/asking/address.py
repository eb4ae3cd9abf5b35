"""Where a teacher is: a list of replicas, a file that may change while a run goes on, and DNS names.

`http://host:8101` is one replica. `dns+http://host:8101` is one for every address that the name has at the moment.
`serve://NAME` is a Ray Serve application, asked by handle from inside its cluster. In a file there is one such line per
replica; blank lines and lines that begin with # are left out.
"""

import asyncio
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

from teachers.errors import TeacherError, Unavailable

DNS = "dns+"


@dataclass(frozen=True)
class TeacherAddress:
    """Where a teacher is and how it is to be asked.

    urls         one per replica; dns+http://… for one per address of a name
    urls_file    a file with more of them, read again while the run goes on
    key          bearer key, None for an open teacher
    ca_file      certificates to trust, where the system's are not enough
    tokenizer    folder with its tokenizer.json, for a plain vLLM server, which hands out none
    timeout_s    total time for one question
    patience_s   how long no replica may answer before the teacher is lost
    on_loss      what then: `wait` ends the run, and so does `stop`, without patience; `drop` goes on without it
    concurrency  most questions under way at once, per replica; how many pay is found out
    """

    name: str
    urls: tuple[str, ...] = ()
    urls_file: Path | None = None
    key: str | None = field(default=None, repr=False)
    ca_file: Path | None = None
    tokenizer: Path | None = None
    timeout_s: float = 120.0
    patience_s: float = 600.0
    on_loss: Literal["wait", "drop", "stop"] = "wait"
    concurrency: int = 32

    @property
    def may_change(self) -> bool:
        """Whether find_replicas may say something else later."""
        return self.urls_file is not None or any(url.startswith(DNS) for url in self.urls)


async def find_replicas(address: TeacherAddress) -> list[str]:
    """The addresses of all replicas now, each once, in order.

    Raises TeacherError for a file that cannot be read, and Unavailable for a DNS name that has no address now.
    """
    name, file = address.name, address.urls_file
    lines = [*address.urls, *(await asyncio.to_thread(_lines, name, file) if file else [])]
    found: dict[str, None] = {}
    for line in lines:
        found.update(dict.fromkeys(await _resolved(name, line) if line.startswith(DNS) else [line]))
    if not found:
        raise TeacherError(f"teacher {name}: {file or 'its list'} names no replica; expected one address a line")
    return list(found)


def _lines(name: str, file: Path) -> list[str]:
    try:
        text = file.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TeacherError(f"teacher {name}: cannot read the list of replicas {file}: {error}") from error
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


async def _resolved(name: str, url: str) -> list[str]:
    parts = urlsplit(url.removeprefix(DNS))
    if parts.scheme != "http" or not parts.hostname:  # a certificate is for the name, not for its addresses
        raise TeacherError(f"teacher {name}: expected dns+http://HOST:PORT, received {url!r}")
    loop = asyncio.get_running_loop()
    try:
        infos = await loop.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
    except OSError as error:
        raise Unavailable(f"teacher {name}: {parts.hostname} has no address now ({error.strerror})") from error
    hosts = sorted({str(info[4][0]) for info in infos})
    ports = f":{parts.port}" if parts.port else ""
    return [
        urlunsplit((parts.scheme, (f"[{host}]" if ":" in host else host) + ports, parts.path, "", "")) for host in hosts
    ]
