"""Settings of the loss."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from trainer.config_section import Fraction, OpenFraction, Positive, Section, one_of
from trainer.losses import DIVERGENCES


class LossConfig(Section):
    """[loss] λ · cross-entropy + (1 − λ) · distillation loss (fused target and auxiliary losses)."""

    ce_weight: Fraction = 0.3
    """λ: 1 trains on the text alone, 0 on the teachers alone. FuseLLM uses 0.9; docs/quality.md compares values."""
    final_ce_weight: Fraction | None = None
    """λ at the end of the run, where `schedule` changes it. Default: `ce_weight`."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How λ moves from `ce_weight` to `final_ce_weight` over the steps of the run."""
    divergence: Annotated[str, one_of(DIVERGENCES)] = "forward_kl"
    """Divergence between target and student. `forward_kl` is KL(target ‖ student), `reverse_kl` is
    KL(student ‖ target); the others lie between the two and are bounded. All treat the tail as one bucket on both
    sides."""
    alpha: OpenFraction | None = None
    """skew_kl, skew_reverse_kl: weight of the first distribution in the mixture. Default: 0.1."""
    beta: OpenFraction | None = None
    """jensen_shannon: weight of the target in the mixture. Default: 0.5."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of target and student in the divergence. A value other than 1 costs a second pass over the
    vocabulary. The target's tail is treated as spread evenly over all tokens that are not listed: above 1 this makes
    the tail too heavy, so keep near 1 unless the listed mass is high."""
    span_temperature: Annotated[float, Field(gt=0)] = 100.0
    """alm: likelihoods p of spans are compared as p^(1/τ). At τ = 1 an unlikely span contributes little."""
    chunk_tokens: Positive = 512
    """Number of positions whose logits are in memory at the same time. With `alm`, overlapping spans of several
    teachers can make it larger."""

    @model_validator(mode="after")
    def _check(self) -> "LossConfig":
        if self.alpha is not None or self.beta is not None:
            from trainer.losses.divergences import divergence  # imports torch

            divergence(self.divergence, self.alpha, self.beta)
        return self

    @property
    def end_ce_weight(self) -> float:
        """λ at the end of the run."""
        return self.ce_weight if self.final_ce_weight is None else self.final_ce_weight
