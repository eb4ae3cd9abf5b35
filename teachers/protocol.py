"""The wire contract between a trainer and a teacher: what is said in JSON. The answer's rows are in rows.py.

A leaf: both sides import it, and it imports no torch, no vllm, no ray and no HTTP.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

PROTOCOL = "1"
ARROW_STREAM = "application/vnd.apache.arrow.stream"
PROBLEM = "application/problem+json"
TIMEOUT_HEADER = "tutelage-timeout-s"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")

PROBE = "The lighthouse keeper climbed the stairs every evening. He counted them once, long ago, and never again."


class Message(BaseModel):
    """Base of everything sent as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Card(Message):
    """What a teacher is. Two replicas of one teacher have equal cards."""

    protocol: str = PROTOCOL
    """Version of this contract."""
    model: str
    """Model name."""
    revision: str | None = None
    """Revision of the weights, if the source has one."""
    fingerprint: str
    """Changes with the weights or the tokenizer; every answer carries it."""
    engine: str
    """Backend and version, like 'transformers 5.19.0'."""
    dtype: str
    """Type the weights are computed in."""
    vocab_size: int
    """Number of token ids the model scores."""
    tokenizer_sha256: str
    """sha256 of tokenizer.json."""
    bos_id: int | None
    eos_id: int | None
    expects_bos: bool
    """Whether the model was trained with BOS in front of every text."""
    chat_template_sha256: str | None = None
    max_tokens: int
    """Longest sequence it takes, BOS included."""
    max_top_k: int
    """Largest K it answers."""
    max_chosen: int = 0
    """Most chosen ids a position that it scores beside its K likeliest; 0 where its engine cannot."""

    @property
    def prefix(self) -> list[int]:
        """The ids that stand in front of every text: BOS where the model expects it, else nothing."""
        return [self.bos_id] if self.expects_bos and self.bos_id is not None else []


class ScoreRequest(Message):
    """Sequences to score, complete with BOS where the model expects it."""

    sequences: list[list[Annotated[int, Field(ge=0)]]]
    starts: list[Annotated[int, Field(ge=1)]]
    top_k: Annotated[int, Field(ge=1)]
    chosen: list[list[list[Annotated[int, Field(ge=0)]]]] = []
    """For each sequence, for each position from its start on, ids to score beside the K likeliest: as many at every
    position, at most the card's max_chosen. Empty: none."""

    @property
    def num_chosen(self) -> int:
        """Chosen ids at every position."""
        return len(self.chosen[0][0]) if self.chosen and self.chosen[0] else 0


class TokenizerFile(Message):
    """One downloadable tokenizer file."""

    name: str
    sha256: str


class Problem(Message):
    """An error as RFC 9457 has it. `detail` is one sentence that says what to change."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    type: str = "about:blank"
    title: str
    status: int
    detail: str


class Ready(Message):
    """The engine answered."""

    status: Literal["ready"] = "ready"
