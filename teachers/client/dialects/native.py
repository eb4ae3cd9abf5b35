"""The native dialect: the protocol of teachers.protocol over HTTP."""

import asyncio
import hashlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter

from teachers.client.dialects.base import ReplicaAddress, has_route
from teachers.client.http import Sender, Transport
from teachers.protocol.decoding import decoding
from teachers.protocol.errors import FingerprintMismatch, NotFound, ProtocolError
from teachers.protocol.messages import (
    ARROW_STREAM,
    TIMEOUT_HEADER,
    TOKENIZER_FILES,
    Ready,
    ScoreRequest,
    TeacherCard,
    TokenizerFile,
)
from teachers.protocol.rows import Rows
from teachers.protocol.wire_format import check_version, read_stream

CARD_TIMEOUT_S = 30.0
FILES_TIMEOUT_S = 240.0  # of all tokenizer files together
MAX_FILES_BYTES = 256 << 20  # of all tokenizer files together; the largest known tokenizer.json has 35 MB
OVERHEAD_BYTES = 64 * 1024  # schema, batch headers and end marker of a stream
SEQUENCE_BYTES = 1024  # header of one record batch
M = TypeVar("M", bound=BaseModel)
_LISTING = TypeAdapter(list[TokenizerFile])


class NativeDialect:
    """Servers that have the route /v1/teacher."""

    unused_keys: ClassVar[Mapping[str, str]] = {"tokenizer": "provides its own tokenizer", "model": "has one model"}

    async def accepts(self, address: ReplicaAddress) -> bool:
        if not address.is_http:
            return False
        client = self.client(address)
        return await has_route(client, client.card)

    def client(self, address: ReplicaAddress) -> "NativeClient":
        return NativeClient(address.teacher, address.url, address.key, address.ca_file)


class NativeClient:
    """Client of a server that uses the native protocol. A ReplicaClient."""

    def __init__(
        self,
        name: str,
        url: str,
        key: str | None = None,
        ca_file: Path | None = None,
        sender: Sender | None = None,
    ) -> None:
        self._http = Transport(name, url, key, ca_file, sender)

    @property
    def url(self) -> str:
        return self._http.url

    async def aclose(self) -> None:
        await self._http.aclose()

    async def card(self) -> TeacherCard:
        """Return the properties of the teacher. Raises VersionMismatch for another protocol version."""
        return await self._card(CARD_TIMEOUT_S)

    async def ready(self) -> None:
        """Raise Unavailable unless the engine can score a token."""
        data = await self._http.get("/ready", CARD_TIMEOUT_S)
        with self._http.named_errors():
            parse(Ready, data, "response of /ready")

    async def ping(self, timeout_s: float) -> None:
        await self._http.get("/health", timeout_s)

    async def check(self, card: TeacherCard, timeout_s: float) -> None:
        """Compare the card of the replica with `card`. Raises FingerprintMismatch, or Unavailable if not ready."""
        received = await self._card(timeout_s)
        with self._http.named_errors():
            if difference := card.difference(received):
                raise FingerprintMismatch(f"{difference}: the teacher was restarted with another model or other limits")
        with suppress(NotFound):  # a proxy may forward /v1 only
            await self._http.get("/ready", timeout_s)

    async def tokenizer_files(self, card: TeacherCard) -> dict[str, bytes]:
        deadline = asyncio.get_running_loop().time() + FILES_TIMEOUT_S
        listing = await self._http.get("/v1/teacher/tokenizer", CARD_TIMEOUT_S)
        with self._http.named_errors():
            expected = _expected_files(listing, card)
        files: dict[str, bytes] = {}
        for name, sha256 in expected.items():
            remaining_bytes = MAX_FILES_BYTES - sum(map(len, files.values()))
            remaining_s = max(deadline - asyncio.get_running_loop().time(), 0.001)
            data = await self._http.get(f"/v1/teacher/tokenizer/{name}", remaining_s, remaining_bytes)
            with self._http.named_errors():
                if (received := hashlib.sha256(data).hexdigest()) != sha256:
                    raise FingerprintMismatch(
                        f"expected {name} with sha256 {sha256[:12]}, received {received[:12]}: "
                        "the server provides another tokenizer than its card states"
                    )
            files[name] = data
        return files

    async def score(self, request: ScoreRequest, card: TeacherCard, timeout_s: float) -> list[Rows]:
        positions = sum(len(s) - start for s, start in zip(request.sequences, request.starts, strict=True))
        row_bytes = request.top_k * 6 + 8 + request.num_chosen * 4
        data = await self._http.post(
            "/v1/score",
            request.model_dump_json(exclude_defaults=True).encode(),  # optional fields only if they are used
            timeout_s,
            expect=ARROW_STREAM,
            limit_bytes=positions * row_bytes + len(request.sequences) * SEQUENCE_BYTES + OVERHEAD_BYTES,
            headers={TIMEOUT_HEADER: f"{timeout_s:.3f}"},
        )
        with self._http.named_errors():
            return read_stream(data, request, card)

    async def _card(self, timeout_s: float) -> TeacherCard:
        data = await self._http.get("/v1/teacher", timeout_s)
        with self._http.named_errors():
            return parse_card(data)


def _expected_files(listing: bytes, card: TeacherCard) -> dict[str, str]:
    """Return the expected SHA-256 of every file to download, by name.

    The card is authoritative for the tokenizer and the chat template, the listing for the other files.
    """
    with decoding("list of tokenizer files"):
        entries = _LISTING.validate_json(listing)
    files: dict[str, str] = {}
    for entry in entries:
        if entry.name in files:
            raise ProtocolError(f"the list of tokenizer files names {entry.name} twice")
        if entry.name in TOKENIZER_FILES:
            files[entry.name] = entry.sha256
    files["tokenizer.json"] = card.tokenizer_sha256
    if card.chat_template_sha256 is not None:
        files["chat_template.jinja"] = card.chat_template_sha256
    return files


class _CardVersion(BaseModel):
    """The only field of a card that all protocol versions have."""

    model_config = ConfigDict(extra="ignore")

    protocol: str


def parse_card(data: bytes) -> TeacherCard:
    """Parse a card, the version first. Raises VersionMismatch for another version, and ProtocolError."""
    check_version(parse(_CardVersion, data, "card").protocol)
    return parse(TeacherCard, data, "card")


def parse(model: type[M], data: bytes, name: str) -> M:
    """Parse a message. Raises ProtocolError, which contains `name` and the invalid field."""
    with decoding(name):
        return model.model_validate_json(data)
