"""The language model head: logits from hidden states."""

from dataclasses import dataclass

import torch
from torch import Tensor

# shapes: C positions of a chunk, V vocabulary, D hidden size


@dataclass(frozen=True, eq=False)
class LMHead:
    """Output projection with the scale and soft cap of the model family.

    logits = cap · tanh(z / cap) with z = scale · (hidden · weightᵀ + bias); without a cap, logits = z.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    def logits(self, hidden_CD: Tensor) -> Tensor:
        """Return logits [C, V] in float32, or in float64 if the product is float64."""
        logits_CV = hidden_CD @ self.weight_VD.T
        logits_CV = logits_CV.to(accumulation_dtype(logits_CV))
        if self.bias_V is not None:
            logits_CV += self.bias_V
        if self.scale != 1:
            logits_CV *= self.scale
        return logits_CV.div_(self.cap).tanh_().mul_(self.cap) if self.cap else logits_CV

    def backward_(self, grad_CV: Tensor, logits_CV: Tensor | None) -> Tensor:
        """Turn the gradient of the logits into that of hidden · weightᵀ + bias, in place, and return it.

        `logits_CV` are the logits of the forward pass. They are needed only with a soft cap:
        d logits / d z = 1 − tanh²(z / cap) = 1 − (logits / cap)².
        """
        if self.cap and logits_CV is not None:
            grad_CV *= 1 - (logits_CV / self.cap) ** 2
        return grad_CV.mul_(self.scale) if self.scale != 1 else grad_CV


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Return the type for softmax and sums: float32, or float64 for float64 input."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
