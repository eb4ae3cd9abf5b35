"""Forward KL divergence."""

import torch
from torch import Tensor


def forward_kl(p_TB: Tensor, log_q_TB: Tensor) -> Tensor:
    """KL(target ‖ student). It penalizes missing probability wherever the target has probability.

    Returns [T] nats: Σ p · (log p − log q), with 0 · log 0 = 0.
    """
    kl_T: Tensor = -(torch.special.entr(p_TB) + p_TB * log_q_TB).sum(-1)
    return kl_T
