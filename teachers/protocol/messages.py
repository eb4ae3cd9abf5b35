"""JSON messages between a client and a teacher server. wire_format.py has the score rows of a response.

This module is a leaf: client and server import it, and it imports no torch, no vllm, no ray and no HTTP library.

Versioning: PROTOCOL changes when a required field is added or removed, or when the meaning of a field changes. An
optional field may be added without a new version. Clients therefore compare the version before they validate anything
else and ignore unknown fields of responses. Requests are strict: a server rejects a field that it does not know, so a
client sends an optional field only if the server's card states that it is supported (as `max_chosen` does).

Integers are strict: 6.0, "6" and true are rejected. The texts of a card are sanitized when it is built
(untrusted_text.py).
"""

import hashlib
import struct
from array import array
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from teachers.protocol.untrusted_text import clean

PROTOCOL = "3"
ARROW_STREAM = "application/vnd.apache.arrow.stream"
PROBLEM = "application/problem+json"
TIMEOUT_HEADER = "tutelage-timeout-s"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")

PROBE = "The lighthouse keeper climbed the stairs every evening. He counted them once, long ago, and never again."

MAX_VOCAB_SIZE = 1 << 24  # the largest vocabularies have 300,000 ids; tables of this length are allocated
MAX_TOKENS = 1 << 31

Text = Annotated[str, AfterValidator(clean)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
TokenId = Annotated[int, Field(ge=0, lt=1 << 32)]


class RequestMessage(BaseModel):
    """Base class of JSON requests. Unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ResponseMessage(BaseModel):
    """Base class of JSON responses. Unknown fields are ignored: a newer server may send more of them."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class TeacherCard(ResponseMessage):
    """The properties of a teacher. Two replicas of one teacher have equal cards."""

    protocol: str = PROTOCOL
    """Protocol version of the server."""
    model: Text
    """Model name."""
    revision: Text | None = None
    """Revision of the weights, if the source has one."""
    fingerprint: Sha256
    """Hash of weights, tokenizer and dtype; every score response carries it."""
    engine: Text
    """Engine and version, for example 'transformers 5.19.0'."""
    dtype: Text
    """Type of the weights and activations."""
    vocab_size: Annotated[int, Field(ge=1, le=MAX_VOCAB_SIZE)]
    """Number of token ids that the model scores."""
    tokenizer_sha256: Sha256
    """sha256 of tokenizer.json."""
    bos_id: TokenId | None
    """Id of the BOS token, None if the tokenizer has none."""
    eos_id: TokenId | None
    """Id of the EOS token, None if the model has none."""
    expects_bos: bool
    """Whether the model was trained with BOS in front of every text."""
    chat_template_sha256: Sha256 | None = None
    """sha256 of chat_template.jinja, if there is one."""
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)]
    """Longest sequence in tokens, BOS included."""
    max_top_k: Annotated[int, Field(ge=1, le=MAX_VOCAB_SIZE)]
    """Largest K that the server returns."""
    max_chosen: Annotated[int, Field(ge=0, le=MAX_VOCAB_SIZE)] = 0
    """Largest number of chosen ids per position, scored besides the top K; 0 if the engine does not score any."""

    @model_validator(mode="after")
    def _check_ids(self) -> "TeacherCard":
        for name in ("bos_id", "eos_id", "max_top_k"):
            value, limit = getattr(self, name), self.vocab_size + (name == "max_top_k")
            if value is not None and value >= limit:
                raise ValueError(f"{name} is {value}, but the vocabulary has {self.vocab_size} ids")
        return self

    @property
    def prefix(self) -> list[int]:
        """The ids in front of every text: BOS if the model expects it, else none."""
        return [self.bos_id] if self.expects_bos and self.bos_id is not None else []

    @property
    def masks_positions(self) -> bool:
        """Whether some positions of a response may be masked, because the server returns no ids."""
        return False

    @property
    def protocol_cost(self) -> str | None:
        """What the responses of a stock server cost compared with the native protocol, for the user.

        None for a teacher with the native protocol.
        """
        return None

    def difference(self, received: "TeacherCard") -> str | None:
        """Return the first field that differs in another card, with both values; None if the cards are equal."""
        for name in type(self).model_fields:
            expected, other = getattr(self, name), getattr(received, name, None)
            if expected != other:
                return f"expected {name} {clean(expected, 80)}, received {clean(other, 80)}"
        return None


class ScoreRequest(RequestMessage):
    """Sequences to score. Each sequence includes BOS if the model expects it."""

    sequences: list[list[TokenId]]
    """Token ids, one list per sequence."""
    starts: list[Annotated[int, Field(ge=1, lt=1 << 32)]]
    """First scored position of each sequence."""
    top_k: Annotated[int, Field(ge=1, lt=1 << 32)]
    """Number of candidates per position."""
    chosen: list[list[list[TokenId]]] = []
    """Further ids to score, per sequence and per position from its start on: the same number of ids at every position,
    at most the card's max_chosen. Empty: none."""

    @property
    def num_chosen(self) -> int:
        """Number of chosen ids per position."""
        return len(self.chosen[0][0]) if self.chosen and self.chosen[0] else 0


def id_array(ids: Sequence[int]) -> NDArray[np.uint32]:
    """Return token ids as a uint32 array, three times faster than numpy.array. Raises OverflowError for larger ids."""
    return np.frombuffer(array("I", ids), dtype=np.uint32)


def request_digest(ids: NDArray[np.uint32], start: int, top_k: int, chosen: ArrayLike = ()) -> str:
    """Return the digest of the request for one sequence. The response contains it, and the client compares it.

    The digest is the first 16 bytes of a SHA-256, in hexadecimal, over little-endian uint32 values: length, start, K,
    number of chosen ids, the ids of the sequence, and the chosen ids.
    """
    chosen = np.asarray(chosen, dtype="<u4")
    head = struct.pack("<4I", ids.size, start, top_k, chosen.size)
    digest = hashlib.sha256(head + ids.astype("<u4", copy=False).tobytes() + chosen.tobytes())
    return digest.hexdigest()[:32]


class TokenizerFile(ResponseMessage):
    """Name and hash of one downloadable tokenizer file."""

    name: Text
    sha256: Sha256


class Problem(ResponseMessage):
    """An error response as defined by RFC 9457. `detail` is one sentence that states what to change."""

    type: Text = "about:blank"
    title: Text
    status: int
    detail: Text


class Ready(ResponseMessage):
    """The engine works."""

    status: Literal["ready"] = "ready"
