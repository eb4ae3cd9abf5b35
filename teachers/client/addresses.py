"""The address of a teacher: a list of replicas, a file that may change during a run, and DNS names.

`http://host:8101` is one replica. `dns+http://host:8101` is one replica for every address to which the name resolves.
`serve://NAME` is a Ray Serve application, reached by handle from inside its cluster. A file contains one such address
per line; blank lines and lines that start with # are ignored. Two spellings of one HTTP address are one replica.
"""

import asyncio
import logging
import re
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from pathlib import Path
from typing import Literal
from urllib.parse import SplitResult, unquote, urlsplit

from teachers.protocol.errors import TeacherError, Unavailable

log = logging.getLogger("tutelage.pool")
DNS = "dns+"
DEFAULT_PORTS = {"http": 80, "https": 443}
HOST_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?")
HIDDEN = "…"
AUTHORITY = re.compile(r"(?:[a-z][a-z0-9+.-]*:)?/*([^/?#]*)", re.IGNORECASE)  # also of an address without a scheme
RESOLVE_EVERY_S = 10.0  # interval at which files and DNS names with replicas are read again


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
    start_timeout_s        time to wait for the first replica when connecting; 0 to try once
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
    start_timeout_s: float = 0.0
    unavailable_timeout_s: float = 600.0
    on_unavailable: Literal["wait", "drop", "stop"] = "wait"
    concurrency: int = 32
    tokens_per_minute: int | None = None

    @property
    def may_change(self) -> bool:
        """Whether resolve_urls may return other replicas later."""
        return self.urls_file is not None or any(url.startswith(DNS) for url in self.urls)


async def resolve_urls(address: TeacherAddress) -> list[str]:
    """Return the canonical addresses of all current replicas, without duplicates, in order.

    Raises TeacherError for an unreadable file, an empty list or an invalid address, and Unavailable for a DNS name
    without an address.
    """
    name, file = address.name, address.urls_file
    lines = [*address.urls, *(await asyncio.to_thread(_read_lines, name, file) if file else [])]
    urls: dict[str, None] = {}
    for line in lines:
        url = canonical_url(name, line)
        urls.update(dict.fromkeys(await _resolve_dns(name, url) if url.startswith(DNS) else [url]))
    if not urls:
        raise TeacherError(f"teacher {name}: {file or 'urls'} contains no replica; expected one address per line")
    return list(urls)


async def follow_urls(address: TeacherAddress) -> AsyncIterator[list[str]]:
    """Yield the result of resolve_urls every RESOLVE_EVERY_S. An error is logged, and nothing is yielded for it."""
    while True:
        await asyncio.sleep(RESOLVE_EVERY_S)
        try:
            urls = await resolve_urls(address)
        except TeacherError as error:
            log.warning("%s; the replicas remain unchanged", error)
        except Exception:  # otherwise no replica would be added or removed any more
            log.exception("the addresses of teacher %s cannot be resolved", address.name)
        else:
            yield urls


def canonical_url(name: str, url: str) -> str:
    """Return the canonical form of an address, which is the same for all spellings of the address.

    Scheme and host are in lower case, an IPv6 address in its shortest form, and the default port, final slashes and a
    final /v1 are removed: the base URL of an OpenAI client ends in /v1. A proxy that serves the teacher below /v1 is
    written /v1/v1. An address of another scheme (serve://NAME) is returned unchanged. Raises TeacherError if the
    address is malformed, or has a user, a password, a query or a fragment.
    """
    _reject_secrets(name, url)
    lower = url.lower()
    dns = DNS if lower.startswith(DNS) else ""
    scheme, separator, _ = lower.removeprefix(DNS).partition("://")
    if separator and scheme not in DEFAULT_PORTS and not dns:
        return url
    if dns and scheme != "http":  # not https: a certificate is for the name, not for its addresses
        raise TeacherError(f"teacher {name}: expected dns+http://HOST:PORT, received {_shown(url)}")
    try:
        parts = urlsplit(url[len(dns) :])
        authority = _authority(parts)
    except ValueError as error:
        advice = "; if it contains a user or password, name the bearer key with key_file or key_env instead"
        shown = _shown(url)
        raise TeacherError(
            f"teacher {name}: {shown} is not an address: {error}{advice if shown == HIDDEN else ''}"
        ) from error
    path = re.sub("/v1$", "", parts.path.rstrip("/")).rstrip("/")
    return f"{dns}{scheme}://{authority}{path}"


def _reject_secrets(name: str, url: str) -> None:
    """Raise TeacherError if an address has a user, a password, a query or a fragment. The message repeats none of them.

    An @ in the path is valid. In the authority (host and port) it ends the user and the password.
    """
    found = AUTHORITY.match(url)
    authority = unquote(found[1]) if found else ""
    if "@" in authority:
        host = re.split("[/?#]", authority.rpartition("@")[2])[0]
        raise TeacherError(
            f"teacher {name}: the address …@{host} contains a user or password: remove it, and name the bearer key "
            "with key_file or key_env"
        )
    if "?" in url or "#" in url:
        raise TeacherError(
            f"teacher {name}: the address {_shown(url)} is followed by a query or fragment: remove it, and name the "
            "bearer key with key_file or key_env"
        )


def _shown(url: str) -> str:
    """Return an address for a message, without query and fragment; HIDDEN if it has an @, which may end a password."""
    return HIDDEN if "@" in unquote(url) else repr(re.split("[?#]", url)[0])


def _authority(parts: SplitResult) -> str:
    """Return host and port in canonical form. Raises ValueError, which shows a valid address, for any other."""
    expected = "expected http://HOST:PORT or https://HOST:PORT"
    if parts.netloc.count(":") > 1 and "[" not in parts.netloc:
        raise ValueError("an IPv6 address is written in brackets, for example http://[::1]:8101")
    if any(c.isspace() or not c.isprintable() for c in parts.geturl()):
        raise ValueError(f"{expected}, without spaces and control characters")
    try:
        default = DEFAULT_PORTS[parts.scheme]
        port = default if parts.port is None else parts.port
        host = _ipv6(parts.hostname or "") if "[" in parts.netloc else (parts.hostname or "").encode("idna").decode()
    except (KeyError, ValueError) as error:
        raise ValueError(expected) from error
    if port == 0 or not (host.startswith("[") or HOST_NAME.fullmatch(host)):
        raise ValueError(expected)
    return host if port == default else f"{host}:{port}"


def _ipv6(host: str) -> str:
    return f"[{IPv6Address(unquote(host))}]"  # in a URL, the % in front of a zone may be written %25


def _read_lines(name: str, file: Path) -> list[str]:
    try:
        text = file.expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TeacherError(f"teacher {name}: cannot read the list of replicas {file}: {error}") from error
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


async def _resolve_dns(name: str, url: str) -> list[str]:
    parts = urlsplit(url.removeprefix(DNS))
    port = parts.port or DEFAULT_PORTS["http"]
    try:
        infos = await asyncio.get_running_loop().getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise Unavailable(f"teacher {name}: {parts.hostname} has no address now ({error.strerror})") from error
    hosts = sorted({str(info[4][0]) for info in infos})
    suffix = ("" if port == DEFAULT_PORTS["http"] else f":{port}") + parts.path
    return [f"http://{_ipv6(host) if ':' in host else host}{suffix}" for host in hosts]
