"""Total variation distance."""

from torch import Tensor


def total_variation(p_TB: Tensor, log_q_TB: Tensor) -> Tensor:
    """½ · Σ |target − student|. This is the mass that would have to move; the gradient has the same size everywhere.

    Returns [T] probabilities from 0 to 1.
    """
    return 0.5 * (p_TB - log_q_TB.exp()).abs().sum(-1)
