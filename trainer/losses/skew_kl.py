"""Skew KL divergence (DistiLLM, arXiv 2402.03898)."""

from torch import Tensor

from trainer.losses.divergences import log_mixture, log_target
from trainer.losses.forward_kl import forward_kl


def skew_kl(p_TB: Tensor, log_q_TB: Tensor, alpha: float = 0.1) -> Tensor:
    """KL(target ‖ α · target + (1 − α) · student). It acts like forward KL and is at most −log α.

    Returns [T] nats. Source: DistiLLM, arXiv 2402.03898.
    """
    return forward_kl(p_TB, log_mixture(log_target(p_TB), log_q_TB, alpha))
