"""Reverse KL divergence."""

from torch import Tensor

from trainer.losses.divergences import log_target


def reverse_kl(p_TB: Tensor, log_q_TB: Tensor) -> Tensor:
    """KL(student ‖ target). It penalizes probability wherever the target has none.

    Returns [T] nats: Σ q · (log q − log p), with p clamped to MIN_TARGET_PROB.
    """
    return (log_q_TB.exp() * (log_q_TB - log_target(p_TB))).sum(-1)
