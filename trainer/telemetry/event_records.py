"""Records nested in the events of metrics.jsonl. The docstring under each field is its entry in docs/metrics.md."""

import math

from pydantic import BaseModel, ConfigDict, Field


def finite(value: float) -> float | None:
    """Return None for NaN, the mean of no values, and for infinity."""
    return value if math.isfinite(value) else None


class Record(BaseModel):
    """A frozen record whose fields are described by the docstrings below them. Unknown fields are rejected."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelIdentity(Record):
    """Name and revision of a model."""

    model: str
    """Model name on the Hugging Face Hub, or the name of the model's folder."""
    revision: str | None
    """Revision on the Hub; null for a folder."""


class TeacherIdentity(Record):
    """The part of a teacher's card that identifies its model."""

    model: str
    """Model name."""
    revision: str | None
    """Revision of the weights; null if the source has none."""
    fingerprint: str
    """SHA-256 over the weights, the tokenizer and the dtype; equal for replicas of one teacher."""
    engine: str
    """Inference engine and its version."""
    dtype: str
    """Type in which the weights are computed."""
    vocab_size: int
    """Number of token ids that the model scores."""
    tokenizer_sha256: str
    """SHA-256 of tokenizer.json."""


class SourceStatistics(Record):
    """Size of one data source."""

    name: str
    """Name of the source."""
    format: str
    """Kind of the documents, and the columns that they are read from."""
    is_chat: bool
    """Whether the documents are chats."""
    has_prompt: bool
    """Whether the documents are texts with a masked prompt."""
    documents: int
    """Documents in the source."""
    windows: int
    """Windows into which the documents are cut."""
    tokens: int | None
    """Tokens of the student's tokenizer; null for chats."""
    num_bytes: int
    """Bytes of text, or of chats as JSON."""
    epoch_samples: int
    """Samples of the source in one epoch of training."""
    invalid: int
    """Lines or rows that cannot be parsed."""
    first_invalid: list[str]
    """Descriptions of the first lines or rows that cannot be parsed."""
    empty: int
    """Number of lines or rows that are skipped because their text or chat is empty."""
    repeated: list[str]
    """Files that are not read again because they are listed before by another name, with both names."""


class PoolStep(Record):
    """Load balancer of one teacher, as seen by rank 0. Counters run since the start of the process."""

    requests: int
    """Requests that succeeded."""
    tokens: int
    """Token positions that these requests scored."""
    retries: int
    """Requests that were sent again after a failure."""
    hedged: int
    """Requests that were also sent to a second replica because the first one was slow."""
    rejected: int
    """Responses that failed validation."""
    sent_tokens: int = 0
    """Tokens sent to the teacher, repeated and hedged requests included. What a paid endpoint counts."""
    replicas: int
    """Known replicas."""
    healthy: int
    """Replicas that are healthy now."""
    concurrency: int
    """Requests that the healthy replicas may process at once."""


class TeacherStep(Record):
    """One teacher in one step."""

    weight: float | None
    """Mean weight of the teacher in the distillation loss, over the samples of the batch (0 to 1); null if all of them
    were skipped."""
    missing: int
    """Positions at which this teacher has no distribution to fuse."""
    unavailable: int
    """Samples without scores of this teacher because it was unavailable."""
    masked: int = 0
    """Tokens of the teacher whose scores are masked, because its server returns no ids and their strings are
    ambiguous."""
    mass: float | None
    """Mean listed mass: probability of the listed tokens (0 to 1)."""
    own_bpb: float | None
    """Bits per byte of the training text on the teacher's own tokens."""
    aligned_bpb: float | None
    """Bits per byte of the training text after alignment to the student's tokens."""
    wait_s: float
    """Seconds of the step's `wait_s` in which only the scores of this teacher were missing."""
    tokens_per_s: float
    """Recent throughput of the teacher, summed over ranks, in tokens per second."""
    pool: PoolStep
    """Load balancer of the teacher."""
    loss: float = 0.0
    """Loss of a teacher that is not fused, without its weight, in nats per token."""
    rollout_bpb: float | None = None
    """Bits per byte of the rollouts on the teacher's own tokens, end tokens included. It falls while the student learns
    to write what the teacher considers likely. Absent without rollouts."""
    unaligned: dict[str, int] = Field(default={})
    """Supervised positions of chats without a distribution of this teacher, by reason: its template omits the part
    (`omitted`) or renders it differently (`different`), or a token reaches across a boundary (`boundary`). Absent
    without such positions."""


class RolloutStep(Record):
    """The student's rollouts in one step. Means are over sampled tokens, of all ranks."""

    samples: int
    """Rollouts."""
    tokens: int
    """Sampled tokens, end tokens included."""
    num_bytes: int
    """Bytes of sampled text."""
    divergence: float | None
    """Divergence of the student from the fused target, in nats per token; null without tokens."""
    cross_entropy: float | None
    """Negative log-likelihood of the sampled tokens by the weights before the step, in nats per token; null without
    tokens."""
    own_bpb: float | None
    """Bits per byte of the rollouts by the weights that sampled them; null without bytes."""
    fused_bpb: float | None
    """Bits per byte of the rollouts by the fused target, where it is valid; null without such bytes."""
    entropy: float
    """Entropy of the student where it sampled, in nats per token, at temperature 1."""
    length: float
    """Tokens per rollout."""
    finished: float
    """Fraction of the rollouts that ended with an end token or a stop string, instead of the limit on tokens."""
    repetition: float
    """Fraction of the tokens that end a run of four tokens which the same rollout contains earlier."""
    cut: int
    """Sampled tokens that are not used, because they are not whole characters."""
    noncanonical: int
    """Tokens without a target because the tokenizer writes their text with other tokens."""
    age_steps: float
    """Steps between the weights that sampled a token and the weights that are trained on it; at most
    `rollout.max_staleness_steps`."""
    max_age_steps: int
    """Largest number of such steps."""
    sample_s: float
    """Seconds in which the training loop sampled rollouts before the step, of the rank that took longest."""


class Agreement(Record):
    """Agreement of the student with a target, over the positions at which the target lists a token."""

    top1: float | None
    """Fraction of positions at which the most likely tokens are equal; null without positions."""
    kl: float | None
    """KL(target ‖ student) over the listed tokens and the tail, in nats per token; null without positions."""
