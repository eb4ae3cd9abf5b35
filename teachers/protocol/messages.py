"""JSON messages between a client and a teacher server. wire_format.py has the score rows of a response.

This module is a leaf: client and server import it, and it imports no torch, no vllm, no ray and no HTTP library.

Versioning: PROTOCOL changes when a required field is added or removed, or when the meaning of a field changes. An
optional field may be added without a new version. Clients therefore compare the version before they validate anything
else and ignore unknown fields of responses. Requests are strict: a server rejects a field that it does not know, so a
client sends an optional field only if the server's card states that it is supported (as `max_chosen` does).
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

PROTOCOL = "2"
ARROW_STREAM = "application/vnd.apache.arrow.stream"
PROBLEM = "application/problem+json"
TIMEOUT_HEADER = "tutelage-timeout-s"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")

PROBE = "The lighthouse keeper climbed the stairs every evening. He counted them once, long ago, and never again."


class RequestMessage(BaseModel):
    """Base class of JSON requests. Unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ResponseMessage(BaseModel):
    """Base class of JSON responses. Unknown fields are ignored: a newer server may send more of them."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class TeacherCard(ResponseMessage):
    """The properties of a teacher. Two replicas of one teacher have equal cards."""

    protocol: str = PROTOCOL
    """Protocol version of the server."""
    model: str
    """Model name."""
    revision: str | None = None
    """Revision of the weights, if the source has one."""
    fingerprint: str
    """Hash of weights, tokenizer and dtype; every score response carries it."""
    engine: str
    """Engine and version, for example 'transformers 5.19.0'."""
    dtype: str
    """Type of the weights and activations."""
    vocab_size: int
    """Number of token ids that the model scores."""
    tokenizer_sha256: str
    """sha256 of tokenizer.json."""
    bos_id: int | None
    """Id of the BOS token, None if the tokenizer has none."""
    eos_id: int | None
    """Id of the EOS token, None if the model has none."""
    expects_bos: bool
    """Whether the model was trained with BOS in front of every text."""
    chat_template_sha256: str | None = None
    """sha256 of chat_template.jinja, if there is one."""
    max_tokens: int
    """Longest sequence in tokens, BOS included."""
    max_top_k: int
    """Largest K that the server returns."""
    max_chosen: int = 0
    """Largest number of chosen ids per position, scored besides the top K; 0 if the engine does not score any."""

    @property
    def prefix(self) -> list[int]:
        """The ids in front of every text: BOS if the model expects it, else none."""
        return [self.bos_id] if self.expects_bos and self.bos_id is not None else []


class ScoreRequest(RequestMessage):
    """Sequences to score. Each sequence includes BOS if the model expects it."""

    sequences: list[list[Annotated[int, Field(ge=0)]]]
    """Token ids, one list per sequence."""
    starts: list[Annotated[int, Field(ge=1)]]
    """First scored position of each sequence."""
    top_k: Annotated[int, Field(ge=1)]
    """Number of candidates per position."""
    chosen: list[list[list[Annotated[int, Field(ge=0)]]]] = []
    """Further ids to score, per sequence and per position from its start on: the same number of ids at every position,
    at most the card's max_chosen. Empty: none."""

    @property
    def num_chosen(self) -> int:
        """Number of chosen ids per position."""
        return len(self.chosen[0][0]) if self.chosen and self.chosen[0] else 0


class TokenizerFile(ResponseMessage):
    """Name and hash of one downloadable tokenizer file."""

    name: str
    sha256: str


class Problem(ResponseMessage):
    """An error response as defined by RFC 9457. `detail` is one sentence that states what to change."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str


class Ready(ResponseMessage):
    """The engine works."""

    status: Literal["ready"] = "ready"
