"""JSON messages between a trainer and a rollout server: the weights that the server has, and new weights to load.

A rollout server generates texts with the current weights of the student. Weights are identified by a tag: the version
that the trainer has given them and a digest of the folder that they were read from. Two weights of the same version,
for example before and after a resumed run, have different tags.
"""

import re
from typing import Annotated

from pydantic import Field

from teachers.protocol.errors import ProtocolError, Unavailable
from teachers.protocol.messages import RequestMessage, ResponseMessage, Sha256
from teachers.protocol.untrusted_text import clean

WEIGHTS_HEADER = "tutelage-weights"
"""In a request: the tag of the weights that the client expects; the server refuses another one (409). In a response:
the tag of the weights that the server had at the end of the request."""
MANIFEST = "manifest.json"
BASE_TAG = "base"
DAMAGED_TAG = "damaged"
TAG = re.compile(r"([0-9]{1,16})-[0-9a-f]{16}")

Version = Annotated[int, Field(ge=0, lt=1 << 53)]


class SyncRequest(RequestMessage):
    """Weights to load."""

    version: Version
    """Version of the weights. Only compared for equality."""
    path: Annotated[str, Field(min_length=1, max_length=4096)]
    """Absolute path of the folder on the server's machine."""
    digest: Sha256
    """SHA-256 of the manifest in the folder."""


class WeightsVersion(ResponseMessage):
    """The weights of a server."""

    version: Version | None
    """Version of the last successful synchronization, None if the server has the weights that it was started with."""
    digest: Sha256 | None = None
    """Digest of the folder from which they were read."""
    is_damaged: bool = False
    """Whether loading failed after some weights were replaced. Only another synchronization repairs it."""

    @property
    def tag(self) -> str:
        """The version and the first 16 digits of the digest; `base` or `damaged` if there is no version."""
        if self.is_damaged:
            return DAMAGED_TAG
        return BASE_TAG if self.version is None else f"{self.version}-{(self.digest or '')[:16]}"


def version_of_tag(tag: str | None) -> int | None:
    """Return the version in a tag; None for `base`.

    Raises Unavailable for `damaged`, and ProtocolError if there is no valid tag.
    """
    if tag == BASE_TAG:
        return None
    if tag == DAMAGED_TAG:
        raise Unavailable("its weights are damaged: synchronize it")
    match = TAG.fullmatch(tag or "")
    if match is None:
        raise ProtocolError(f"expected the tag of weights in {WEIGHTS_HEADER}, received {clean(tag, 60)}")
    return int(match[1])
