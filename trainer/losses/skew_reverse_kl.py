"""Skew reverse KL divergence (DistiLLM, arXiv 2402.03898)."""

from torch import Tensor

from trainer.losses.divergences import log_mixture, log_target


def skew_reverse_kl(p_TB: Tensor, log_q_TB: Tensor, alpha: float = 0.1) -> Tensor:
    """KL(student ‖ α · student + (1 − α) · target). It acts like reverse KL and is at most −log α.

    Returns [T] nats. Source: DistiLLM, arXiv 2402.03898.
    """
    return (log_q_TB.exp() * (log_q_TB - log_mixture(log_q_TB, log_target(p_TB), alpha))).sum(-1)
