"""One replica of a teacher over HTTP. The only file that imports httpx, and the one place its errors are mapped."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

import httpx
from pydantic import BaseModel, TypeAdapter, ValidationError

from teachers.errors import (
    FingerprintMismatch,
    Overloaded,
    ProtocolError,
    Rejected,
    TeacherError,
    Truncated,
    Unauthorized,
    Unavailable,
    VersionMismatch,
)
from teachers.protocol import (
    ARROW_STREAM,
    PROTOCOL,
    TIMEOUT_HEADER,
    TOKENIZER_FILES,
    Card,
    Problem,
    Ready,
    Rows,
    ScoreRequest,
    TokenizerFile,
    read_stream,
)

CARD_TIMEOUT_S = 30.0
FILE_TIMEOUT_S = 120.0
_OVERHEAD_BYTES = 64 * 1024  # schema, batch headers, end mark
M = TypeVar("M", bound=BaseModel)
_LISTING = TypeAdapter(list[TokenizerFile])


class TeacherClient:
    """Asks one server process. Close it when done; every call has a total deadline in seconds.

    Raises the errors of teachers.errors, each message beginning with the teacher's name and address.
    """

    def __init__(self, name: str, url: str, key: str | None = None) -> None:
        self.name = name
        self.url = check_url(name, url)
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.AsyncClient(base_url=self.url, headers=headers, timeout=None, trust_env=False)

    async def aclose(self) -> None:
        await self._http.aclose()

    async def card(self) -> Card:
        """What the teacher is. Raises VersionMismatch for another protocol."""
        data = await self._get("/v1/teacher", CARD_TIMEOUT_S)
        with self._named():
            card = _parse(Card, data)
            if card.protocol != PROTOCOL:
                raise VersionMismatch(f"expected protocol {PROTOCOL}, received {card.protocol}: upgrade one side")
            return card

    async def ready(self) -> None:
        """Return once the engine has answered a question. Raises Unavailable if it does not."""
        data = await self._get("/ready", CARD_TIMEOUT_S)
        with self._named():
            _parse(Ready, data)

    async def tokenizer_files(self, card: Card) -> dict[str, bytes]:
        """The tokenizer's files, each as its listing and the card say. Raises FingerprintMismatch otherwise."""
        listing = await self._get("/v1/teacher/tokenizer", CARD_TIMEOUT_S)
        with self._named():
            try:
                entries = _LISTING.validate_json(listing)
            except ValidationError as error:
                raise ProtocolError(f"the list of tokenizer files is malformed: {error.errors()[0]['msg']}") from error
        files = {}
        for entry in entries:
            if entry.name in TOKENIZER_FILES:
                files[entry.name] = await self._get(f"/v1/teacher/tokenizer/{entry.name}", FILE_TIMEOUT_S)
        with self._named():
            promised = {entry.name: entry.sha256 for entry in entries} | {"tokenizer.json": card.tokenizer_sha256}
            for name, sha256 in promised.items():
                received = hashlib.sha256(files.get(name, b"")).hexdigest()
                if name in TOKENIZER_FILES and received != sha256:
                    raise FingerprintMismatch(
                        f"expected {name} with sha256 {sha256[:12]}, received {received[:12]}: "
                        "this teacher serves another tokenizer than its card says"
                    )
        return files

    async def score(self, request: ScoreRequest, card: Card, timeout_s: float) -> list[Rows]:
        """One Rows per sequence, in their order, checked against the card."""
        positions = sum(len(s) - start for s, start in zip(request.sequences, request.starts, strict=True))
        limit = positions * (request.top_k * 6 + 8) + len(request.sequences) * 1024 + _OVERHEAD_BYTES
        async with self._deadline(timeout_s):
            headers = {"content-type": "application/json", TIMEOUT_HEADER: f"{timeout_s:.3f}"}
            body = request.model_dump_json()
            async with self._http.stream("POST", "/v1/score", content=body, headers=headers) as response:
                await _raise_for_status(response)
                if (kind := response.headers.get("content-type")) != ARROW_STREAM:
                    raise ProtocolError(f"expected {ARROW_STREAM}, received {kind}")
                data = await _read(response, limit)
        with self._named():
            return read_stream(data, request, card)

    async def _get(self, path: str, timeout_s: float) -> bytes:
        async with self._deadline(timeout_s), self._http.stream("GET", path) as response:
            await _raise_for_status(response)
            return await response.aread()

    @asynccontextmanager
    async def _deadline(self, timeout_s: float) -> AsyncIterator[None]:
        """A total time limit, and httpx's errors as ours."""
        with self._named():
            try:
                async with asyncio.timeout(timeout_s):
                    yield
            except TimeoutError as error:
                raise Unavailable(f"no complete answer within {timeout_s:g} s") from error
            except httpx.RemoteProtocolError as error:
                raise Truncated("the connection was closed before the answer was complete") from error
            except httpx.TransportError as error:
                raise Unavailable(f"nothing answers ({type(error).__name__})") from error
            except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
                raise ProtocolError(f"no valid HTTP exchange: {error}") from error

    def _named(self) -> "_Named":
        return _Named(f"teacher {self.name} at {self.url}")


def check_url(name: str, url: str) -> str:
    """The address without a trailing slash. Raises TeacherError if it is none."""
    try:
        parsed = httpx.URL(url.rstrip("/"))
    except httpx.InvalidURL as error:
        raise TeacherError(f"teacher {name}: {url!r} is no address ({error})") from error
    if parsed.scheme not in ("http", "https") or not parsed.host or not 0 < (parsed.port or 80) < 65536:
        raise TeacherError(f"teacher {name}: {url!r} is no address: expected http://HOST:PORT")
    return str(parsed).rstrip("/")


class _Named:
    """Puts the teacher's name in front of an error's message, once."""

    def __init__(self, who: str) -> None:
        self._who = who

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, TeacherError) and not str(error).startswith("teacher "):
            error.args = (f"{self._who}: {error}",)


async def _raise_for_status(response: httpx.Response) -> None:
    if response.status_code == 200:
        return
    data = await _read(response, _OVERHEAD_BYTES)
    try:
        detail = Problem.model_validate_json(data).detail
    except ValidationError:
        detail = f"HTTP {response.status_code}"
    match response.status_code:
        case 401 | 403:
            raise Unauthorized(detail)
        case 429 | 503:
            raise Overloaded(detail, _retry_after_s(response))
        case status if status >= 500:
            raise Unavailable(detail)
        case status if status >= 400:
            raise Rejected(detail)
        case status:
            raise ProtocolError(f"expected status 200, received {status}")


def _retry_after_s(response: httpx.Response) -> float | None:
    value = response.headers.get("retry-after", "")
    return float(value) if value.isdecimal() else None


async def _read(response: httpx.Response, limit_bytes: int) -> bytes:
    data = bytearray()
    async for chunk in response.aiter_bytes():
        data += chunk
        if len(data) > limit_bytes:
            raise ProtocolError(f"expected at most {limit_bytes} bytes, received more")
    return bytes(data)


def _parse(model: type[M], data: bytes) -> M:
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the answer"
        raise ProtocolError(f"malformed {model.__name__.lower()}: {where}: {first['msg']}") from error
