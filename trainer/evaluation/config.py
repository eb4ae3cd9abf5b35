"""Settings of evaluation on held-out text."""

from typing import Annotated

from pydantic import Field

from trainer.config_section import Positive, Section


class EvalConfig(Section):
    """[eval] Bits per byte on held-out text, and agreement with the teachers on it."""

    held_out_documents: Annotated[int, Field(ge=0)] = 0
    """Number of held-out documents, drawn at random from train.seed."""
    every_steps: Positive | None = None
    """Interval of evaluations. The student is always evaluated before the first and after the last step."""
    max_samples: Positive | None = None
    """Maximum number of held-out windows to evaluate."""
    agreement_samples: Annotated[int, Field(ge=0)] = 0
    """Number of held-out samples, evenly spaced, on which agreement is measured: how often the student's most likely
    token is that of each teacher and of the fused target, and KL(target ‖ student). Teachers are queried once; their
    scores stay in memory."""
    early_stopping_patience: Positive | None = None
    """Stop after this many consecutive evaluations without an improvement."""
    early_stopping_min_delta: Annotated[float, Field(ge=0)] = 0.0
    """Bits per byte by which an evaluation must be better than the best one before to count as an improvement."""
