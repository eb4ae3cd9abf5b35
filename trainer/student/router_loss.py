"""Auxiliary loss of the router of a mixture-of-experts student: E · Σ_e f_e · P_e (arXiv 2101.03961).

f_e is the fraction of tokens that are routed to expert e, P_e the mean probability of e, both over all layers. The
function is that of the model's own module in transformers. It is not linear in the tokens: it is computed for every
microbatch, over its tokens without padding, and the results are averaged with their numbers of tokens as weights.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.errors import ConfigError

FUNCTION = "load_balancing_loss_func"  # name of the function in the modules of transformers


@dataclass(frozen=True)
class RouterLoss:
    """The auxiliary loss of one model.

    weight              coefficient in the loss
    num_experts, top_k  experts of a layer, and experts per token
    """

    weight: float
    num_experts: int
    top_k: int
    function: Callable[..., Tensor]

    def compute(self, router_logits: tuple[Tensor, ...], is_token_BL: Tensor) -> Tensor:
        """Return the unweighted loss over the tokens that are not padding; 0 without tokens.

        router_logits  [B · L, E] for every layer
        Raises ConfigError if the model returned none.
        """
        if not router_logits:
            raise ConfigError(
                "student: the model returns no logits of its router, from which the auxiliary loss is computed: set "
                "student.compile to false, or student.router_aux_loss_weight to 0"
            )
        is_token = is_token_BL.flatten()
        logits = tuple(layer.flatten(0, -2)[is_token].float() for layer in router_logits)
        if not len(logits[0]):
            return torch.stack([layer.sum() for layer in logits]).sum()  # 0, with a gradient for the collectives
        return self.function(logits, self.num_experts, self.top_k)


def router_loss_of(model: Any, weight: float | None) -> RouterLoss | None:
    """Return the router's loss of a model, or None if it has weight 0.

    weight  student.router_aux_loss_weight; with None, the model's config decides as in transformers: the weight is its
            router_aux_loss_coef if output_router_logits is true, else 0
    Raises ConfigError if a weight is configured and transformers has no such loss for the model.
    """
    config = model.config.get_text_config()
    own = getattr(config, "router_aux_loss_coef", 0.0) if getattr(config, "output_router_logits", False) else 0.0
    chosen = own if weight is None else weight
    if not chosen:
        return None
    function = getattr(sys.modules[type(model).__module__], FUNCTION, None)
    num_experts = _first(model, config, "num_experts", "num_local_experts")
    top_k = _first(model, config, "num_experts_per_tok", "top_k")
    if function is None or num_experts is None or top_k is None:
        if weight is None:
            return None
        raise ConfigError(
            f"student.router_aux_loss_weight is {weight:g}, but transformers has no auxiliary loss of a router for "
            f"{type(model).__name__}: remove the key"
        )
    return RouterLoss(float(chosen), num_experts, top_k, function)


def _first(model: Any, config: Any, *names: str) -> int | None:
    """Return the first attribute that model or config has."""
    values = (getattr(owner, name, None) for owner in (model, config) for name in names)
    return next((value for value in values if isinstance(value, int)), None)
