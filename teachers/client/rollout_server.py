"""Client of one rollout server: new weights, texts that the student writes, and log-probabilities of a fixed text.

Texts are token ids in both directions: nothing is decoded and encoded again. Every request for a text names the weights
that it expects by their tag (teachers/protocol/rollouts.py), so that a restarted server does not write with the weights
of its model directory. The tag is also the salt of the prefix cache, because vLLM keeps the cache of earlier weights.
"""

import asyncio
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from teachers.client.http import MAX_SMALL_BYTES, Transport
from teachers.client.rollout_completions import (
    MAX_TOKEN_BYTES,
    GeneratedTokens,
    GenerationRequest,
    read_generated,
    read_scored,
    scoring_body,
)
from teachers.protocol.decoding import decoding
from teachers.protocol.errors import Conflict, ProtocolError
from teachers.protocol.rollouts import MANIFEST, WEIGHTS_HEADER, SyncRequest, WeightsVersion, version_of_tag

JSON = "application/json"
TIMEOUT_S = 600.0  # of a synchronization, a text or a probe
SHORT_TIMEOUT_S = 60.0


class RolloutServer:
    """One rollout server. Raises the errors of teachers.protocol.errors, which name the server. Close it when done."""

    def __init__(self, url: str, key: str | None = None, ca_file: Path | None = None, name: str = "student") -> None:
        self._http = Transport(name, url, key, ca_file, kind="rollout server of")
        self._weights: WeightsVersion | None = None  # as last reported

    @property
    def url(self) -> str:
        return self._http.url

    async def aclose(self) -> None:
        await self._http.aclose()

    async def ping(self, timeout_s: float = SHORT_TIMEOUT_S) -> None:
        """Return if the engine works. Raises Unavailable."""
        await self._http.get("/health", timeout_s)

    async def version(self, timeout_s: float = SHORT_TIMEOUT_S) -> int | None:
        """Return the version of the weights. None stands for damaged weights and those of the model directory."""
        self._weights = self._decode(await self._http.get("/v1/rollouts/version", timeout_s))
        return self._weights.version

    async def sync(self, folder: Path, version: int, timeout_s: float = TIMEOUT_S) -> None:
        """Load the weights of a folder of `write_sync_folder`, which has the same path on the machine of the server.

        Requests in flight continue with the new weights. Raises Rejected, with the weights unchanged, if the server
        refuses the folder, and OSError if the folder has no manifest.
        """
        folder = Path(os.path.abspath(folder))  # without "..", which the server refuses
        manifest = await asyncio.to_thread((folder / MANIFEST).read_bytes)
        request = SyncRequest(version=version, path=str(folder), digest=hashlib.sha256(manifest).hexdigest())
        body = request.model_dump_json().encode()
        self._weights = None
        path, limit = "/v1/rollouts/weights", MAX_SMALL_BYTES
        weights = self._decode(await self._http.post(path, body, timeout_s, expect=JSON, limit_bytes=limit))
        with self._http.named_errors():
            if (weights.version, weights.digest) != (version, request.digest):
                raise ProtocolError(f"expected the weights of version {version}, received {weights.tag}")
        self._weights = weights

    async def generate(
        self, request: GenerationRequest, *, version: int | None, timeout_s: float = TIMEOUT_S
    ) -> GeneratedTokens:
        """Sample a continuation of a prompt.

        version  version of the weights that sample it; None for the weights in the model directory

        Raises Conflict if the server has other weights, and Unavailable if they are damaged. Cancelling aborts the
        request in the server.
        """
        tag = await self._tag(version)
        data, last = await self._complete(request.body(tag), request.limit_bytes, timeout_s, tag)
        with self._http.named_errors():
            return read_generated(data, request, (version, version_of_tag(last)))

    async def probe(self, ids: Sequence[int], version: int | None, timeout_s: float = TIMEOUT_S) -> NDArray[np.float32]:
        """Return the log-probabilities of ids[1:], float32, with the weights of this version, without the prefix cache.

        Raises Conflict if the server has other weights, also if they were replaced during the request, and Unavailable
        if they are damaged.
        """
        tag = await self._tag(version)
        body, limit_bytes = scoring_body(ids, "probe"), (len(ids) + 16) * MAX_TOKEN_BYTES
        data, last = await self._complete(body, limit_bytes, timeout_s, tag)
        with self._http.named_errors():
            version_of_tag(last)
            if last != tag:
                self._weights = None
                raise Conflict(f"its weights {tag} were replaced by {last} during the request")
            return read_scored(data, ids)

    async def _tag(self, version: int | None) -> str:
        """Return the tag of the server's weights. Raises Conflict or Unavailable if they are not of this version."""
        weights = self._weights
        if weights is None or weights.version != version or weights.is_damaged:
            await self.version()
            weights = self._weights
        assert weights is not None, "set by version()"
        with self._http.named_errors():
            version_of_tag(weights.tag)
            if weights.version != version:
                expected = "those of its model directory" if version is None else f"version {version}"
                raise Conflict(f"expected the weights {expected}, the server has {weights.tag}: synchronize it")
        return weights.tag

    async def _complete(self, body: bytes, limit_bytes: int, timeout_s: float, tag: str) -> tuple[bytes, str | None]:
        """Return the response to a request for the weights `tag`, and the tag of the weights at its end."""
        try:
            data, headers = await self._http.post_with_headers(
                "/v1/completions", body, timeout_s, expect=JSON, limit_bytes=limit_bytes, headers={WEIGHTS_HEADER: tag}
            )
            return data, headers.get(WEIGHTS_HEADER)
        except Conflict:
            self._weights = None
            raise

    def _decode(self, data: bytes) -> WeightsVersion:
        with self._http.named_errors(), decoding("version of weights"):
            return WeightsVersion.model_validate_json(data)
