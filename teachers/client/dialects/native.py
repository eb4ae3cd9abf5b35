"""The native dialect: the protocol of teachers.protocol over HTTP."""

import hashlib
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from teachers.client.dialects.base import ReplicaAddress, has_route
from teachers.client.http import Sender, Transport
from teachers.protocol.errors import FingerprintMismatch, ProtocolError, TeacherError
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
FILE_TIMEOUT_S = 120.0
OVERHEAD_BYTES = 64 * 1024  # schema, batch headers and end marker of a stream
SEQUENCE_BYTES = 1024  # header of one record batch
M = TypeVar("M", bound=BaseModel)
_LISTING = TypeAdapter(list[TokenizerFile])


class NativeDialect:
    """Servers that have the route /v1/teacher."""

    async def accepts(self, address: ReplicaAddress) -> bool:
        if address.scheme not in ("http", "https"):
            return False
        client = self.client(address)
        if not await has_route(client, client.card):
            return False
        if address.tokenizer is not None:
            raise TeacherError(
                f"teacher {address.teacher} at {client.url} provides its own tokenizer: remove "
                f"teachers.{address.teacher}.tokenizer ({address.tokenizer})"
            )
        return True

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
        """Return once the engine has scored a token. Raises Unavailable if it does not."""
        data = await self._http.get("/ready", CARD_TIMEOUT_S)
        with self._http.named_errors():
            parse(Ready, data)

    async def ping(self, timeout_s: float) -> None:
        await self._http.get("/health", timeout_s)

    async def check(self, card: TeacherCard, timeout_s: float) -> None:
        received = await self._card(timeout_s)
        with self._http.named_errors():
            if received != card:
                raise FingerprintMismatch(
                    f"expected fingerprint {card.fingerprint[:12]}, received {received.fingerprint[:12]}: the teacher "
                    "was restarted with other weights, another tokenizer or other limits"
                )

    async def tokenizer_files(self, card: TeacherCard) -> dict[str, bytes]:
        listing = await self._http.get("/v1/teacher/tokenizer", CARD_TIMEOUT_S)
        with self._http.named_errors():
            try:
                entries = _LISTING.validate_json(listing)
            except ValidationError as error:
                raise ProtocolError(f"the list of tokenizer files is malformed: {error.errors()[0]['msg']}") from error
        files = {}
        for entry in entries:
            if entry.name in TOKENIZER_FILES:
                files[entry.name] = await self._http.get(f"/v1/teacher/tokenizer/{entry.name}", FILE_TIMEOUT_S)
        expected = {entry.name: entry.sha256 for entry in entries} | {"tokenizer.json": card.tokenizer_sha256}
        with self._http.named_errors():
            for name, sha256 in expected.items():
                received = hashlib.sha256(files.get(name, b"")).hexdigest()
                if name in TOKENIZER_FILES and received != sha256:
                    raise FingerprintMismatch(
                        f"expected {name} with sha256 {sha256[:12]}, received {received[:12]}: "
                        "the server provides another tokenizer than its card states"
                    )
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


class _CardVersion(BaseModel):
    """The version of a card. Every other field may differ between versions."""

    model_config = ConfigDict(extra="ignore")

    protocol: str


def parse_card(data: bytes) -> TeacherCard:
    """Parse a card. Raises VersionMismatch before anything but the version is validated, then ProtocolError."""
    check_version(parse(_CardVersion, data).protocol)
    return parse(TeacherCard, data)


def parse(model: type[M], data: bytes) -> M:
    """Parse a message. Raises ProtocolError naming the wrong field."""
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the response"
        name = model.__name__.strip("_").lower()
        raise ProtocolError(f"malformed {name}: {field}: {first['msg']}") from error
