"""Generalized Jensen-Shannon divergence (GKD, arXiv 2306.13649)."""

from torch import Tensor

from trainer.losses.divergences import log_mixture, log_target
from trainer.losses.forward_kl import forward_kl


def jensen_shannon(p_TB: Tensor, log_q_TB: Tensor, beta: float = 0.5) -> Tensor:
    """β · KL(target ‖ m) + (1 − β) · KL(student ‖ m), with m = β · target + (1 − β) · student.

    It lies between forward and reverse KL and is at most log 2. Returns [T] nats. Source: arXiv 2306.13649.
    """
    log_m_TB = log_mixture(log_target(p_TB), log_q_TB, beta)
    student_kl_T = (log_q_TB.exp() * (log_q_TB - log_m_TB)).sum(-1)
    return beta * forward_kl(p_TB, log_m_TB) + (1 - beta) * student_kl_T
