"""Responses that do not change while a server runs: the card, the list of tokenizer files, and their contents."""

import hashlib
import mimetypes
from collections.abc import AsyncIterator

from pydantic import TypeAdapter
from starlette.responses import Response, StreamingResponse

from teachers.engines.base import Engine
from teachers.protocol.messages import TokenizerFile
from teachers.server.admission import Rejection

CHUNK_BYTES = 64 * 1024  # a slow reader holds up one chunk


class StaticResponses:
    """Responses of a teacher that are computed once. The contents of the files are those that were hashed."""

    def __init__(self, engine: Engine) -> None:
        self._files = dict(engine.tokenizer_files)
        self._sha256 = {name: hashlib.sha256(data).hexdigest() for name, data in self._files.items()}
        self._card = engine.card.model_dump_json().encode()
        listing = [TokenizerFile(name=name, sha256=sha256) for name, sha256 in self._sha256.items()]
        self._listing = TypeAdapter(list[TokenizerFile]).dump_json(listing)

    def card(self) -> Response:
        """Return the response with the card."""
        return Response(self._card, media_type="application/json")

    def listing(self) -> Response:
        """Return the response with names and hashes of the tokenizer files."""
        return Response(self._listing, media_type="application/json")

    def tokenizer_file(self, name: str) -> Response:
        """Return the response with the content of a tokenizer file. Raises Rejection if it is not listed."""
        if name not in self._files:
            raise Rejection(404, "No such file", f"expected one of {', '.join(self._files)}, received {name}")
        data = self._files[name]
        headers = {"content-length": str(len(data)), "etag": f'"{self._sha256[name]}"'}
        return StreamingResponse(_chunks(data), 200, headers, mimetypes.guess_type(name)[0] or "text/plain")


async def _chunks(data: bytes) -> AsyncIterator[bytes]:
    for begin in range(0, len(data), CHUNK_BYTES):
        yield data[begin : begin + CHUNK_BYTES]
