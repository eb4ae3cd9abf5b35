"""Typed events: one frozen model for each kind of line in metrics.jsonl.

The docstring under each field is its entry in docs/metrics.md (trainer/telemetry/reference.py). A field without a
default is in every event of its kind. A field with a default is written only where the caller sets it, so that a value
that was not measured is absent. A value that was measured but does not exist (a mean over nothing) is null.
"""

from typing import Any, ClassVar

from pydantic import Field

from trainer.telemetry.event_records import (
    Agreement,
    ModelIdentity,
    Record,
    RolloutStep,
    SourceStatistics,
    TeacherIdentity,
    TeacherStep,
)


class Event(Record):
    """Base class of the events. `kind` is the value of the key `event`."""

    kind: ClassVar[str]

    def fields(self) -> dict[str, Any]:
        """Return the fields that were set, in the order of their definition, as nested plain values."""
        return self.model_dump(exclude_unset=True)


class StartEvent(Event):
    """A run is started or resumed."""

    kind: ClassVar[str] = "start"

    step: int
    """Steps completed before this start; 0 for a new run."""
    connect_s: float
    """Seconds to connect to the teachers and to build the vocabulary translations."""
    run: dict[str, Any]
    """The whole run file, with defaults."""
    steps: int
    """Planned steps of the whole run."""
    ranks: int
    """Number of training processes."""
    precision: str
    """Precision of the training step, bf16 or fp32: that of the run file, or the one that `auto` chose."""
    samples: int
    """Training samples."""
    sources: list[SourceStatistics]
    """Data sources, in the order of the run file."""
    identity: dict[str, Any]
    """Settings and fingerprints that must not change when the run is resumed."""
    held_out: int
    """Held-out samples that are evaluated."""
    held_out_skipped: int
    """Held-out samples that are skipped because a model cannot represent them."""
    base: ModelIdentity
    """The student before training."""
    changed: dict[str, list[Any]]
    """Settings that differ from the previous start, by key: old value, new value."""
    changed_results: list[str]
    """Those of them with which the results differ from those of a run without the change."""
    teachers: dict[str, TeacherIdentity]
    """Identity of each teacher, by name."""
    software: dict[str, str]
    """Versions of Python and of the main packages."""
    supervision: str
    """What is supervised in the texts and chats."""
    remarks: list[str]
    """Remarks and warnings about the data, and about the chats for the student and for each teacher."""


class StepEvent(Event):
    """One step of the run. Counts and means cover the batches of all ranks; times are those of the rank that waited
    longest. A step whose samples were all skipped updates nothing: its losses and norm are null, its `tokens` 0."""

    kind: ClassVar[str] = "step"

    step: int
    """Steps completed, this one included."""
    ce_weight: float
    """Weight of the cross-entropy in the loss (0 to 1)."""
    loss: float | None
    """Training loss, in nats per token."""
    cross_entropy: float | None
    """Cross-entropy of the text, in nats per token."""
    lr: float
    """Learning rate."""
    grad_norm: float | None
    """Norm of the gradient before clipping."""
    router_loss: float | None = None
    """Unweighted auxiliary loss of the router: the number of experts per token if their load is balanced. `loss` has it
    with its weight. Absent unless the student is a mixture of experts whose router's loss has a weight."""
    tokens: int
    """Predicted tokens in the batch."""
    tokens_per_s: float
    """Tokens per second of step, wait and sampling time."""
    step_s: float
    """Seconds for forward, backward and optimizer."""
    wait_s: float
    """Seconds that the step waited for its batch."""
    queued_batches: int
    """Batches that were ready when the step requested one; 0 if the step had to wait."""
    queued_tokens: int
    """Tokens of these batches."""
    tokenize_s: float
    """CPU seconds of tokenization, on the prefetch threads."""
    align_s: float
    """CPU seconds of alignment, on the prefetch threads."""
    fuse_s: float
    """CPU seconds of fusion, on the prefetch threads."""
    shortened: int
    """Samples that were shortened so that all models can take them."""
    skipped: int
    """Chats that were skipped because a model cannot represent them."""
    folded_system: int
    """Chats whose system message was merged into the first user message."""
    omitted_reasoning: int
    """Messages of chats whose reasoning the student's chat template does not render."""
    changed_content: int
    """Contents, tool calls and tools that the student's chat template drops or rewrites
    (`data.supervision.changed_content = "count"`)."""
    divergence: float | None = None
    """Divergence of the student from the fused target, in nats per token; null where it is not computed because no
    position has a target or its weight in the loss is 0. Absent without teachers."""
    coverage: float | None = None
    """Fraction of predicted positions that have a fused target. Absent without teachers."""
    mass: float | None = None
    """Mean listed mass of the fused target (0 to 1); null without targets. Absent without teachers."""
    tail: float | None = None
    """Mean tail of the fused target, the probability outside the listed tokens; null without targets. Absent without
    teachers."""
    fallbacks: int = 0
    """Positions at which the geometric mean left no possible token, so that the arithmetic mean is used. Absent without
    teachers."""
    teachers: dict[str, TeacherStep] = Field(default={})
    """Each teacher, by name. Absent without teachers."""
    rollouts: RolloutStep | None = None
    """The student's rollouts. Absent without them."""


class EvalEvent(Event):
    """Evaluation of the student on held-out text."""

    kind: ClassVar[str] = "eval"

    step: int
    """Steps completed."""
    held_out_bpb: float
    """Bits per byte of the held-out text."""
    held_out_nats_per_token: float
    """Cross-entropy of the held-out text, in nats per token."""
    held_out_domains: dict[str, float | None] = Field(default={})
    """Bits per byte of each domain; null for a domain without bytes. Absent with a single domain."""
    teachers: dict[str, Agreement] = Field(default={})
    """Agreement with each teacher, by name. Absent without eval.agreement_samples."""
    fused: Agreement = Agreement(top1=None, kl=None)
    """Agreement with the fused target. Absent without eval.agreement_samples."""


class RolloutEvalEvent(Event):
    """Continuations of held-out prompts, which are the same at every evaluation (`rollout.eval_prompts`)."""

    kind: ClassVar[str] = "rollout_eval"

    step: int
    """Steps completed."""
    samples: int
    """Rollouts."""
    teachers: dict[str, float | None]
    """Bits per byte of the rollouts by each teacher, by name, on the teacher's own tokens; null without scores."""
    own_bpb: float | None
    """Bits per byte of the rollouts under the student. Null if the rollouts have no bytes."""
    entropy: float
    """Entropy of the student where it sampled, in nats per token, at temperature 1."""
    length: float
    """Tokens per rollout."""
    finished: float
    """Fraction of the rollouts that ended with an end token or a stop string."""


class CheckpointEvent(Event):
    """A checkpoint is completely written."""

    kind: ClassVar[str] = "checkpoint"

    step: int
    """Steps completed before the checkpoint."""


class ExportEvent(Event):
    """The student is exported to the folder model/ of the run."""

    kind: ClassVar[str] = "export"

    step: int
    """Steps completed."""
    held_out_bpb: float | None
    """Bits per byte of the held-out text with these weights; null if they were not evaluated."""


class EndEvent(Event):
    """The run is left, complete or not."""

    kind: ClassVar[str] = "end"

    step: int
    """Steps completed."""
    model: str | None
    """Folder of the exported student; null if the run is not complete."""
    reason: str | None
    """Why the run ended before its last planned step (early stopping); null otherwise."""


class TeacherLostEvent(Event):
    """A teacher without any healthy replica is lost (on_unavailable decides what follows)."""

    kind: ClassVar[str] = "teacher_lost"

    teacher: str
    """Name of the teacher."""
    detail: str
    """The last error."""


class TeacherJoinedEvent(Event):
    """A lost teacher is available again."""

    kind: ClassVar[str] = "teacher_joined"

    teacher: str
    """Name of the teacher."""
    detail: str
    """The replica that responded."""


EVENTS: tuple[type[Event], ...] = (
    StartEvent,
    StepEvent,
    EvalEvent,
    RolloutEvalEvent,
    CheckpointEvent,
    ExportEvent,
    EndEvent,
    TeacherLostEvent,
    TeacherJoinedEvent,
)
TEACHER_EVENTS: dict[str, type[TeacherLostEvent] | type[TeacherJoinedEvent]] = {
    "teacher_lost": TeacherLostEvent,
    "teacher_joined": TeacherJoinedEvent,
}
