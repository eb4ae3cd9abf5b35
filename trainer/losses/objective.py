"""The training objective: how cross-entropy, the divergence and auxiliary losses add up at every position."""

from dataclasses import dataclass

from torch import Tensor

from trainer.losses.divergences import Divergence
from trainer.losses.forward_kl import forward_kl
from trainer.losses.labels import Labels


@dataclass(frozen=True)
class Objective:
    """λ · cross-entropy + (1 − λ) · (target_share · τ² · divergence + Σ shareᵢ · auxiliary lossᵢ).

    ce_weight         λ
    divergence        divergence of the student from the fused target, and of ALM's outcome probabilities
    temperature       τ, applied to the fused target and to the student; τ² keeps the size of the gradient
    chunk_tokens      positions whose logits exist at the same time
    target_share      share of the fused teachers in the total teacher weight; the labels hold those of the auxiliary
                      losses, and all shares sum to 1
    span_temperature  temperature of ALM, the loss on span likelihoods
    """

    ce_weight: float = 1.0
    divergence: Divergence = forward_kl
    temperature: float = 1.0
    chunk_tokens: int = 512
    target_share: float = 1.0
    span_temperature: float = 100.0

    @property
    def target_weight(self) -> float:
        """Factor of the divergence from the fused target."""
        return (1 - self.ce_weight) * self.target_share * self.temperature**2


def position_losses(
    labels: Labels, objective: Objective, ce_T: Tensor, divergence_T: Tensor, *auxiliary_T: Tensor
) -> Tensor:
    """Return the total loss [T] of each position, in nats.

    `auxiliary_T` are the auxiliary losses in the order of the labels.
    """
    total_T = objective.ce_weight * ce_T + objective.target_weight * divergence_T
    for auxiliary, loss_T in zip(labels.auxiliary, auxiliary_T, strict=True):
        total_T = total_T + (1 - objective.ce_weight) * auxiliary.share * loss_T
    return total_T
