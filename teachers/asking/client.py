"""One replica of a teacher, asked in the language it speaks: our own here, a plain vLLM server's in stock.py."""

import hashlib
import logging
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import cache
from pathlib import Path
from typing import Protocol, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from teachers.asking.stock import StockClient
from teachers.asking.transport import Carrier, Transport
from teachers.errors import FingerprintMismatch, NotFound, ProtocolError, TeacherError, VersionMismatch
from teachers.protocol import (
    ARROW_STREAM,
    PROTOCOL,
    TIMEOUT_HEADER,
    TOKENIZER_FILES,
    Card,
    Ready,
    ScoreRequest,
    TokenizerFile,
)
from teachers.rows import Rows, read_stream

log = logging.getLogger("tutelage.client")
CARD_TIMEOUT_S = 30.0
FILE_TIMEOUT_S = 120.0
OVERHEAD_BYTES = 64 * 1024  # schema, batch headers, end mark
M = TypeVar("M", bound=BaseModel)
_LISTING = TypeAdapter(list[TokenizerFile])


class Client(Protocol):
    """What a pool asks of one replica, in any dialect. Errors are those of teachers.errors and name the replica."""

    @property
    def url(self) -> str:
        """Its address."""
        ...

    async def card(self) -> Card:
        """What the teacher is."""
        ...

    async def tokenizer_files(self, card: Card) -> dict[str, bytes]:
        """The tokenizer's files by name, as the card promises them. Raises FingerprintMismatch otherwise."""
        ...

    async def score(self, request: ScoreRequest, card: Card, timeout_s: float) -> list[Rows]:
        """One Rows per sequence, in their order, checked against the card."""
        ...

    async def check(self, card: Card, timeout_s: float) -> None:
        """Return if it answers and is the teacher of this card. Raises FingerprintMismatch, Unavailable."""
        ...

    async def alive(self, timeout_s: float) -> None:
        """Return if the process answers at all, however busy. Raises Unavailable."""
        ...

    async def aclose(self) -> None:
        """Close its connections."""
        ...


class TeacherClient:
    """A server that speaks our own contract. A Client."""

    def __init__(
        self,
        name: str,
        url: str,
        key: str | None = None,
        ca_file: Path | None = None,
        carrier: Carrier | None = None,
    ) -> None:
        self._http = Transport(name, url, key, ca_file, carrier)

    @property
    def url(self) -> str:
        return self._http.url

    async def aclose(self) -> None:
        await self._http.aclose()

    async def card(self) -> Card:
        """What the teacher is. Raises VersionMismatch for another protocol."""
        return await self._card(CARD_TIMEOUT_S)

    async def ready(self) -> None:
        """Return once the engine has answered a question. Raises Unavailable if it does not."""
        data = await self._http.get("/ready", CARD_TIMEOUT_S)
        with self._http.named():
            parse(Ready, data)

    async def alive(self, timeout_s: float) -> None:
        await self._http.get("/health", timeout_s)

    async def check(self, card: Card, timeout_s: float) -> None:
        found = await self._card(timeout_s)
        with self._http.named():
            if found != card:
                raise FingerprintMismatch(
                    f"expected fingerprint {card.fingerprint[:12]}, received {found.fingerprint[:12]}: the teacher was "
                    "restarted with other weights, another tokenizer or other limits"
                )

    async def tokenizer_files(self, card: Card) -> dict[str, bytes]:
        listing = await self._http.get("/v1/teacher/tokenizer", CARD_TIMEOUT_S)
        with self._http.named():
            try:
                entries = _LISTING.validate_json(listing)
            except ValidationError as error:
                raise ProtocolError(f"the list of tokenizer files is malformed: {error.errors()[0]['msg']}") from error
        files = {}
        for entry in entries:
            if entry.name in TOKENIZER_FILES:
                files[entry.name] = await self._http.get(f"/v1/teacher/tokenizer/{entry.name}", FILE_TIMEOUT_S)
        with self._http.named():
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
        positions = sum(len(s) - start for s, start in zip(request.sequences, request.starts, strict=True))
        data = await self._http.post(
            "/v1/score",
            request.model_dump_json(exclude_defaults=True).encode(),  # what an older server does not know
            timeout_s,
            expect=ARROW_STREAM,
            limit_bytes=positions * (request.top_k * 6 + 8 + request.num_chosen * 4)
            + len(request.sequences) * 1024
            + OVERHEAD_BYTES,
            headers={TIMEOUT_HEADER: f"{timeout_s:.3f}"},
        )
        with self._http.named():
            return read_stream(data, request, card)

    async def _card(self, timeout_s: float) -> Card:
        data = await self._http.get("/v1/teacher", timeout_s)
        with self._http.named():
            card = parse(Card, data)
            if card.protocol != PROTOCOL:
                raise VersionMismatch(f"expected protocol {PROTOCOL}, received {card.protocol}: upgrade one side")
            return card


async def find_client(
    name: str, url: str, key: str | None = None, ca_file: Path | None = None, tokenizer: Path | None = None
) -> Client:
    """The client that speaks this server's dialect; close it when done. `tokenizer` is StockClient's.

    Raises TeacherError if the server speaks none, or has a tokenizer where one is given, and Unavailable if it does not
    answer now.
    """
    native = TeacherClient(name, url, key, ca_file)
    if await _knows(native, native.card):
        if tokenizer is not None:
            await native.aclose()
            raise TeacherError(
                f"teacher {name} at {native.url} hands out its own tokenizer: leave teachers.{name}.tokenizer "
                f"({tokenizer}) out"
            )
        return native
    stock = StockClient(name, url, key, ca_file, tokenizer)
    if await _knows(stock, lambda: stock.model(CARD_TIMEOUT_S)):
        _say_what_it_costs(name)
        return stock
    raise TeacherError(
        f"teacher {name} at {native.url}: something answers, but it is no teacher: it has neither /v1/teacher nor "
        "/v1/models; start one with `tutelage teach MODEL`"
    )


async def _knows(client: Client, ask: Callable[[], Awaitable[object]]) -> bool:
    """Whether the server has what is asked for. Unless it has, the client is closed."""
    async with AsyncExitStack() as unless_found:
        unless_found.push_async_callback(client.aclose)
        try:
            await ask()
        except NotFound:
            return False
        unless_found.pop_all()
        return True


@cache  # once per teacher, not per replica
def _say_what_it_costs(name: str) -> None:
    log.warning(
        "teacher %s is a plain vLLM server: at K = 64 a token takes 4,600 bytes instead of 392, and one core decodes "
        "44,000 of them a second instead of 2,900,000; start it with VLLM_PLUGINS=tutelage, or with `tutelage teach "
        "MODEL --engine vllm`, for the native route",
        name,
    )


def parse(model: type[M], data: bytes) -> M:
    """A message of the contract. Raises ProtocolError naming the key that is wrong."""
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the answer"
        raise ProtocolError(f"malformed {model.__name__.lower()}: {where}: {first['msg']}") from error
