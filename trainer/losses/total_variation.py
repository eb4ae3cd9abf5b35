"""Total variation distance."""

from torch import Tensor


def total_variation(p_TB: Tensor, log_q_TB: Tensor) -> Tensor:
    """½ · Σ |target − student|. It is the probability mass in which target and student differ.

    Returns [T] probabilities from 0 to 1.
    """
    return 0.5 * (p_TB - log_q_TB.exp()).abs().sum(-1)
