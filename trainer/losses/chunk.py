"""The loss of one chunk of positions and its gradient with respect to the logits.

With a temperature of 1, cross-entropy and divergence share one softmax over the vocabulary. Another temperature takes a
second softmax and a copy of the chunk's logits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from trainer.losses.buckets import bucket_logprobs_, cross_entropy_, divergence_and_gradient_
from trainer.losses.labels import Labels
from trainer.losses.lm_head import LMHead
from trainer.losses.objective import Objective

# shapes: C positions of a chunk, V vocabulary, D hidden size


class ChunkLoss(NamedTuple):
    """Unweighted losses, each [C], and the gradient [C, V] of the total loss before the head's scale and soft cap."""

    ce_C: Tensor
    divergence_C: Tensor
    auxiliary: list[Tensor]
    grad_CV: Tensor


def chunk_loss(head: LMHead, hidden_CD: Tensor, labels: Labels, objective: Objective) -> ChunkLoss:
    """Compute losses and gradient of one chunk. Auxiliary losses are in the order of the labels."""
    logits_CV = head.logits(hidden_CD)
    capped_CV = logits_CV.clone() if head.cap else None  # the functions below overwrite the logits
    auxiliary: dict[int, Tensor] = {}
    gradients = []
    for i, one in enumerate(labels.auxiliary):
        if one.operates_on == "logits":
            auxiliary[i], gradient_CV = one.loss(logits_CV, labels, objective)
            gradients.append(gradient_CV)
    ce_C, divergence_C, grad_CV = _text_and_target_(logits_CV, labels, objective, auxiliary)
    for gradient_CV in gradients:
        grad_CV += gradient_CV
    in_order = [auxiliary[i] for i in range(len(labels.auxiliary))]
    return ChunkLoss(ce_C, divergence_C, in_order, head.backward_(grad_CV, capped_CV))


def _text_and_target_(
    logits_CV: Tensor, labels: Labels, objective: Objective, auxiliary: dict[int, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return cross-entropy [C], divergence [C] and the gradient [C, V] of their weighted sum.

    The gradient includes auxiliary losses that operate on the cross-entropy; their values are added to `auxiliary`.
    """
    if objective.target_weight == 0:
        ce_C, grad_CV = cross_entropy_(logits_CV, labels)
        ce_weight_C1 = _cross_entropy_weight(ce_C, labels, objective, auxiliary)
        if objective.ce_weight != 1:
            grad_CV *= ce_weight_C1
        return ce_C, torch.zeros_like(ce_C), grad_CV
    if objective.temperature == 1:
        ce_C, log_q_CB, rest_CV = bucket_logprobs_(logits_CV, labels)
        ce_weight_C1 = _cross_entropy_weight(ce_C, labels, objective, auxiliary)
        divergence_C, grad_CV = divergence_and_gradient_(log_q_CB, rest_CV, labels, objective, ce_weight_C1)
        return ce_C, divergence_C, grad_CV
    # cross-entropy is computed at temperature 1, the divergence at the objective's temperature
    ce_C, ce_grad_CV = cross_entropy_(logits_CV.clone(), labels)
    ce_weight_C1 = _cross_entropy_weight(ce_C, labels, objective, auxiliary)
    _, log_q_CB, rest_CV = bucket_logprobs_(logits_CV.div_(objective.temperature), labels)
    no_cross_entropy = torch.zeros_like(ce_weight_C1)
    divergence_C, grad_CV = divergence_and_gradient_(log_q_CB, rest_CV, labels, objective, no_cross_entropy)
    grad_CV = grad_CV.mul_(1 / objective.temperature).addcmul_(ce_grad_CV, ce_weight_C1)
    return ce_C, divergence_C, grad_CV


def _cross_entropy_weight(ce_C: Tensor, labels: Labels, objective: Objective, auxiliary: dict[int, Tensor]) -> Tensor:
    """Return the weight of each token's cross-entropy in the gradient, auxiliary losses on it included.

    It is [C, 1], or [1, 1] if it is the same for all positions. The losses are added to `auxiliary` by index.
    """
    ce_weight_C1 = ce_C.new_full((1, 1), objective.ce_weight)
    for i, one in enumerate(labels.auxiliary):
        if one.operates_on == "cross_entropy":
            auxiliary[i], factor_C = one.loss(ce_C, labels, objective)
            ce_weight_C1 = ce_weight_C1 + (1 - objective.ce_weight) * one.share * factor_C[:, None]
    return ce_weight_C1
