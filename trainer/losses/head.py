"""LM head and loss in one pass: losses and gradients from hidden states, one chunk of positions at a time.

Logits exist for one chunk only. The gradient of a chunk is computed together with its loss, in one pass over the
vocabulary for every divergence. The backward pass only multiplies it. The cost is three products with the head's
weight, as for cross-entropy alone. Losses are sums; the training step divides once by the global number of tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.losses.chunk import chunk_loss
from trainer.losses.labels import Labels
from trainer.losses.lm_head import LMHead, accumulation_dtype
from trainer.losses.objective import Objective, position_losses

# shapes: T positions of a batch, C of a chunk, V vocabulary, D hidden size, N auxiliary losses


class Loss(NamedTuple):
    """The loss of T positions.

    total         weighted sum over all positions, with its gradient
    ce_T          cross-entropy in nats, unweighted
    divergence_T  divergence from the fused target, unweighted; 0 and not computed where it has no weight
    auxiliary_NT  auxiliary losses, unweighted, in the order of labels.auxiliary
    """

    total: Tensor
    ce_T: Tensor
    divergence_T: Tensor
    auxiliary_NT: Tensor


def head_loss(head: LMHead, hidden_TD: Tensor, labels: Labels, objective: Objective) -> Loss:
    """Compute the loss of T positions, with gradients for the hidden states and for the head if it is trained.

    Products use the type of autocast, or else that of the weight. Softmax and sums use float32 or float64. Raises
    ValueError if the numbers of labels and hidden states differ.
    """
    if len(hidden_TD) != len(labels):
        raise ValueError(f"expected as many labels as hidden states, received {len(labels)} and {len(hidden_TD)}")
    inputs = _Inputs(head, labels, objective, torch.is_grad_enabled())
    return Loss(*_HeadLossFunction.apply(hidden_TD, head.weight_VD, head.bias_V, inputs))


@dataclass(frozen=True, eq=False)
class _Inputs:
    head: LMHead
    labels: Labels
    objective: Objective
    grad_enabled: bool


class _HeadLossFunction(torch.autograd.Function):
    """Autograd function of the total loss. The forward pass computes its gradients; the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, inputs: _Inputs
    ) -> tuple[Tensor, ...]:
        labels, objective, device_type = inputs.labels, inputs.objective, hidden_TD.device.type
        autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocast else weight_VD.dtype
        head = replace(inputs.head, weight_VD=weight_VD.to(dtype))
        # needs_input_grad describes the inputs only; it is true under no_grad as well
        needed = [needs and inputs.grad_enabled for needs in ctx.needs_input_grad]
        gradients = _Gradients((hidden_TD, weight_VD, bias_V), needed)
        chunks = labels.split(objective.chunk_tokens)
        columns, begin = [], 0
        with torch.autocast(device_type, enabled=False):
            for hidden_CD, chunk in zip(hidden_TD.split([len(c) for c in chunks]), chunks, strict=True):
                hidden_CD = hidden_CD.to(dtype)
                losses = chunk_loss(head, hidden_CD, chunk, objective)
                gradients.add(begin, hidden_CD, losses.grad_CV, head.weight_VD)
                columns.append(torch.stack([losses.ce_C, losses.divergence_C, *losses.auxiliary]))
                begin += len(chunk)
        ctx.gradients = gradients.finish()
        ce_T, divergence_T, *auxiliary = torch.cat(columns, 1)
        auxiliary_NT = torch.stack(auxiliary) if auxiliary else ce_T.new_zeros(0, len(ce_T))
        ctx.mark_non_differentiable(ce_T, divergence_T, auxiliary_NT)
        total = position_losses(labels, objective, ce_T, divergence_T, *auxiliary).sum()
        return total, ce_T, divergence_T, auxiliary_NT

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # the gradients are scaled in place, so they can be used once only
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("head_loss: its gradients were used already; compute the loss again")
        return *(None if gradient is None else gradient.mul_(d_total) for gradient in gradients), None


class _ChunkSum:
    """Sum of one tensor per chunk. A single tensor keeps its type; the sum of several is float32 or float64."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def add(self, term: Tensor) -> None:
        self.value = term if self.value is None else self.value.to(accumulation_dtype(term)).add_(term)


class _Gradients:
    """Gradients of hidden states, weight and bias, summed over the chunks; None for inputs that require no gradient."""

    def __init__(self, inputs: tuple[Tensor, Tensor, Tensor | None], needed: Sequence[bool]) -> None:
        self._inputs = inputs
        self._hidden_TD = torch.empty_like(inputs[0]) if needed[0] else None
        self._weight_VD = _ChunkSum() if needed[1] else None
        self._bias_V = _ChunkSum() if needed[2] else None

    def add(self, begin: int, hidden_CD: Tensor, grad_CV: Tensor, weight_VD: Tensor) -> None:
        """Add the chunk that begins at position `begin`; grad_CV is the gradient of hidden · weightᵀ + bias."""
        if self._bias_V:
            self._bias_V.add(grad_CV.sum(0))
        grad_CV = grad_CV.to(weight_VD.dtype)
        if self._hidden_TD is not None:
            self._hidden_TD[begin : begin + len(grad_CV)] = grad_CV @ weight_VD
        if self._weight_VD:
            self._weight_VD.add(grad_CV.T @ hidden_CD)

    def finish(self) -> list[Tensor | None]:
        """Return the gradients of hidden states, weight and bias in the types of the inputs."""
        sums = (self._hidden_TD, *(s.value if s else None for s in (self._weight_VD, self._bias_V)))
        pairs = zip(sums, self._inputs, strict=True)
        return [None if total is None or given is None else total.to(given.dtype) for total, given in pairs]
