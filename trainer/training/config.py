"""Settings of the optimizer, of batches and their order, and of the output of a run."""

from typing import Annotated, Literal

from pydantic import Field

from trainer.config_section import MAX_BYTES, Bytes, Fraction, PathText, Positive, Section, Seed

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Section):
    """[optim] AdamW with linear warm-up and cosine decay."""

    lr: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate."""
    min_lr_ratio: Fraction = 0.1
    """Learning rate of the last step, relative to the peak."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up; at most the number of steps of the run."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay, applied to matrices only."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moments."""
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    """Maximum gradient norm."""


class TrainConfig(Section):
    """[train] Batches, their order, and prefetching."""

    epochs: Positive = 1
    """Number of times that every sample of a source of weight 1 is used."""
    steps: Positive | None = None
    """Stop after this many steps even if epochs remain. The learning rate decays until the last step."""
    batch_samples: Positive = 8
    """Samples per step, over all processes. The last step of the run has the samples that remain."""
    gradient_accumulation_steps: Positive = 1
    """Microbatches per step of each process; must divide batch_samples."""
    seed: Seed = 0
    """Determines the order of samples, the held-out documents, dropout and the initial weights of adapters."""
    deterministic: bool = False
    """Use only deterministic torch operations, and raise an error for operations that have no deterministic
    implementation. Without it a resumed run on a GPU may differ by rounding; on a CPU it does not."""
    prefetch_tokens: Positive = 1 << 16
    """Maximum number of student tokens in flight ahead of the step, per process: tokenized, requested, aligned, fused
    or queued. A sample counts as a full window until it is tokenized. The next step's batch is always in flight,
    however long it is. 65,536 tokens hide a response time of 3 s from a student of 20,000 tokens/s."""
    prefetch_bytes: Annotated[int, Field(gt=0, le=MAX_BYTES)] = 1 << 30
    """Maximum memory of teacher scores and targets in flight, per process, with the same exception. A response that has
    not arrived counts as 20 bytes per candidate: 65,536 tokens at K = 64 take 84 MB per teacher."""
    target_cache_bytes: Bytes = 1 << 30
    """Memory for aligned teacher scores of samples that are used again in a later epoch. They are never written to
    disk."""


class OutputConfig(Section):
    """[output] Where a run writes metrics.jsonl, checkpoints/ and model/."""

    dir: PathText
    """Folder of the run."""
    checkpoint_every_steps: Positive | None = None
    """Interval of checkpoints. The last step always has one."""
    keep_checkpoints: Positive = 2
    """Number of checkpoints to keep; older ones are deleted."""
    export: Literal["last", "best"] = "last"
    """Weights that model/ contains: those after the last step, or those with the best held-out bits per byte, which are
    exported after each evaluation that is the best so far (also before the first step)."""
