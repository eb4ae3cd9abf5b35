"""ALM: loss on the likelihoods of spans of the text (Approximate Likelihood Matching, arXiv 2503.20083).

Let p and q be the probabilities that teacher and student give to the text of a span. There are two outcomes, this text
and any other. The loss is τ · D((p^(1/τ), 1 − p^(1/τ)), (q^(1/τ), 1 − q^(1/τ))) for a divergence D. Its minimum is at
q = p for every τ. The factor τ keeps its size as τ grows: with forward KL it approaches a · log(a / b) − a + b, where
a = −log p and b = −log q.

log q is the sum of the log-probabilities of the span's tokens. Its derivative is therefore one number for all tokens of
the span, which multiplies the gradient of their cross-entropy. The number is known only after the span's last token,
so chunks of positions never end inside a span (`Labels.split`).

Shapes: C positions of a chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.losses.labels import Labels
from trainer.losses.objective import Objective

MAX_SPAN_LOGPROB = -(2.0**-24)  # no span is certain: log(1 − p) and its derivative must stay finite


@dataclass(frozen=True, eq=False)
class SpanLabels:
    """Labels of ALM: one teacher's likelihoods of spans. Spans are disjoint runs of consecutive positions.

    offset_T     int64, distance of the position from the first position of its span; −1 outside spans
    logprobs_T   float32 nats, the teacher's log-probability of the whole span; any value outside spans
    continues_T  bool on the CPU, offset_T > 0: a chunk must not begin at such a position
    share        the teacher's share of the total teacher weight
    """

    offset_T: Tensor
    logprobs_T: Tensor
    continues_T: NDArray[np.bool_]
    share: float
    operates_on: ClassVar[Literal["logits", "cross_entropy"]] = "cross_entropy"

    @classmethod
    def from_numpy(cls, offset_T: np.ndarray, logprobs_T: np.ndarray, share: float) -> "SpanLabels":
        """Build span labels from numpy arrays."""
        return cls(torch.from_numpy(offset_T), torch.from_numpy(logprobs_T), offset_T > 0, share)

    def map(self, function: Callable[[Tensor], Tensor]) -> "SpanLabels":
        """Apply a function to every tensor."""
        return replace(self, offset_T=function(self.offset_T), logprobs_T=function(self.logprobs_T))

    def slice(self, positions: slice) -> "SpanLabels":
        """Return the labels of consecutive positions, which must not begin inside a span."""
        sliced = self.map(lambda tensor: tensor[positions])
        return replace(sliced, continues_T=self.continues_T[positions])

    def loss(self, values: Tensor, labels: Labels, objective: Objective) -> tuple[Tensor, Tensor]:
        """Return the loss [C] of each span at its first position, and the factor [C] of the tokens' cross-entropy.

        `values` is the cross-entropy [C]. Positions outside spans count as spans of their own with a loss and a factor
        of 0.
        """
        ce_C, temperature, is_begin_C = values, objective.span_temperature, self.offset_T == 0
        begin_C = torch.arange(len(ce_C), device=ce_C.device) - self.offset_T.clamp(min=0)
        log_q_C = torch.zeros_like(ce_C).index_add_(0, begin_C, -ce_C)
        p_CB = _outcome_logprobs(self.logprobs_T.to(ce_C.dtype), temperature).exp()
        with torch.enable_grad():
            leaf_C = log_q_C.requires_grad_()
            loss_C = temperature * objective.divergence(p_CB, _outcome_logprobs(leaf_C, temperature)) * is_begin_C
            (grad_C,) = torch.autograd.grad(loss_C.sum(), leaf_C)
        # d log q / d ce = −1 for every token of the span
        return loss_C.detach(), -grad_C[begin_C]


def _outcome_logprobs(logprobs_C: Tensor, temperature: float) -> Tensor:
    """Return tempered log-probabilities [C, 2] of a span's text and of any other text."""
    log_p_C = logprobs_C.clamp(max=MAX_SPAN_LOGPROB) / temperature
    return torch.stack([log_p_C, torch.log(-torch.expm1(log_p_C))], -1)
