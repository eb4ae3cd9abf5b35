"""ULD: loss on sorted probabilities (Universal Logit Distillation, arXiv 2402.12030).

The teacher's K largest probabilities and its tail are compared with the student's K largest probabilities and its tail,
both in descending order, by total variation. Token ids do not matter, so teacher and student may have different
vocabularies. The cost is one more pass over the logits per teacher, without a matrix product.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from trainer.losses.buckets import bucket_logprobs_, divergence_and_gradient_
from trainer.losses.labels import Labels
from trainer.losses.objective import Objective
from trainer.losses.total_variation import total_variation


@dataclass(frozen=True, eq=False)
class SortedProbsLabels:
    """Labels of ULD: one teacher's sorted probabilities at T positions, without token ids.

    probs_TK  float32, the teacher's K largest probabilities in descending order
    tail_T    float32, probability outside the K largest
    share     the teacher's share of the total teacher weight
    At a position without teacher scores, probs_TK and tail_T are 0.
    """

    probs_TK: Tensor
    tail_T: Tensor
    share: float
    operates_on: ClassVar[Literal["logits", "cross_entropy"]] = "logits"
    continues_T: ClassVar[None] = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "SortedProbsLabels":
        """Apply a function to every tensor."""
        return replace(self, probs_TK=function(self.probs_TK), tail_T=function(self.tail_T))

    def slice(self, positions: slice) -> "SortedProbsLabels":
        """Return the labels of consecutive positions."""
        return self.map(lambda tensor: tensor[positions])

    def loss(self, values: Tensor, labels: Labels, objective: Objective) -> tuple[Tensor, Tensor]:
        """Return the total variation [C] between sorted probabilities, and the gradient [C, V] of its part of the loss.

        `values` are the logits [C, V], which stay unchanged. The gradient acts on the tokens that are the student's K
        most likely now. Raises ValueError if the teacher lists more probabilities than the student has tokens.
        """
        logits_CV, (top_k, vocab_size) = values, (self.probs_TK.shape[1], values.shape[1])
        if top_k > vocab_size:
            raise ValueError(f"expected at most {vocab_size} sorted probabilities, as many as tokens, received {top_k}")
        ids_CK = logits_CV.topk(top_k).indices
        target = Labels(labels.tokens_T, ids_CK, torch.ones_like(ids_CK).bool(), self.probs_TK, self.tail_T)
        uld_only = Objective(0.0, total_variation, target_share=(1 - objective.ce_weight) * self.share)
        _, log_q_CB, rest_CV = bucket_logprobs_(logits_CV.clone(), target)
        no_cross_entropy = logits_CV.new_zeros((1, 1))
        return divergence_and_gradient_(log_q_CB, rest_CV, target, uld_only, no_cross_entropy)
