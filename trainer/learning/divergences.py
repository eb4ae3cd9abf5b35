"""How far a student is from a target, over buckets: each listed token, and one for everything else.

Every function takes the target's probabilities p_TB and the student's log-probabilities log_q_TB, the tail last, and
gives [T] nats (total variation: a share of 1), 0 where both are equal. Putting tokens together in a bucket makes no
divergence larger, so each is a lower bound of the same one over the whole vocabulary, exact where nothing is in the
tail. A bucket that is not there has p = 0 and log q = −NOTHING_NATS, and adds nothing.

Where the student goes and the target does not, reverse KL is infinite. Of a tail we only know that it was too small
to be sent, so no target counts as less than FLOOR there: for a true p below it, q · log(FLOOR / p) is missing.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

NOTHING_NATS = 1e4  # e^−10000 is no probability, and finite so that its gradient is
FLOOR = 2.0**-24  # the smallest step of 1 − Σp in float32

Divergence = Callable[[Tensor, Tensor], Tensor]
USUAL_MIX = {"jensen_shannon": 0.5, "skew_kl": 0.1, "skew_reverse_kl": 0.1}


def forward_kl(p_TB: Tensor, log_q_TB: Tensor) -> Tensor:
    """KL(target ‖ student): be wherever the target is."""
    kl_T: Tensor = -(torch.special.entr(p_TB) + p_TB * log_q_TB).sum(-1)
    return kl_T


def reverse_kl(p_TB: Tensor, log_q_TB: Tensor) -> Tensor:
    """KL(student ‖ target): be nowhere that the target is not."""
    return (log_q_TB.exp() * (log_q_TB - _log(p_TB))).sum(-1)


def skew_kl(p_TB: Tensor, log_q_TB: Tensor, mix: float) -> Tensor:
    """KL(target ‖ mix · target + (1 − mix) · student), at most −log(mix) (DistiLLM, arXiv 2402.03898)."""
    return forward_kl(p_TB, _log_mixture(_log(p_TB), log_q_TB, mix))


def skew_reverse_kl(p_TB: Tensor, log_q_TB: Tensor, mix: float) -> Tensor:
    """KL(student ‖ mix · student + (1 − mix) · target), at most −log(mix) (DistiLLM)."""
    return (log_q_TB.exp() * (log_q_TB - _log_mixture(log_q_TB, _log(p_TB), mix))).sum(-1)


def jensen_shannon(p_TB: Tensor, log_q_TB: Tensor, mix: float) -> Tensor:
    """mix · KL(target ‖ m) + (1 − mix) · KL(student ‖ m), m = mix · target + (1 − mix) · student (arXiv 2306.13649)."""
    log_m_TB = _log_mixture(_log(p_TB), log_q_TB, mix)
    of_student_T = (log_q_TB.exp() * (log_q_TB - log_m_TB)).sum(-1)
    return mix * forward_kl(p_TB, log_m_TB) + (1 - mix) * of_student_T


def total_variation(p_TB: Tensor, log_q_TB: Tensor) -> Tensor:
    """Half of Σ |target − student|: the probability that would have to move."""
    return 0.5 * (p_TB - log_q_TB.exp()).abs().sum(-1)


PLAIN: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "total_variation": total_variation,
}
MIXED = {"jensen_shannon": jensen_shannon, "skew_kl": skew_kl, "skew_reverse_kl": skew_reverse_kl}
NAMES = (*PLAIN, *MIXED)


def divergence(name: str, mix: float | None = None) -> Divergence:
    """The divergence of that name; `mix` is the share in its mixture, USUAL_MIX if absent. Raises ValueError."""
    if name in PLAIN:
        return PLAIN[name]
    if name not in MIXED:
        raise ValueError(f"divergence: expected one of {', '.join(NAMES)}, received {name!r}")
    return partial(MIXED[name], mix=USUAL_MIX[name] if mix is None else mix)


def tempered(p_TB: Tensor, temperature: float, rest_T: Tensor) -> Tensor:
    """p^(1/temperature), normalised, where the last bucket stands for `rest_T` tokens.

    Its probability is taken as spread evenly over them. That is the most that p^(1/temperature) of it can be above
    temperature 1, and the least below: a tempered target over top-k has too heavy a tail when softened.
    """
    if temperature == 1:
        return p_TB
    power = 1 / temperature
    log_TB = power * p_TB.log()  # a small power of a small number is none that float32 has
    log_TB[:, -1] += (1 - power) * rest_T.clamp(min=1).log()
    raised_TB = (log_TB - log_TB.amax(-1, keepdim=True).clamp(min=-NOTHING_NATS)).exp()
    return raised_TB / raised_TB.sum(-1, keepdim=True).clamp(min=FLOOR)


def _log(p_TB: Tensor) -> Tensor:
    return p_TB.clamp(min=FLOOR).log()


def _log_mixture(log_a_TB: Tensor, log_b_TB: Tensor, share: float) -> Tensor:
    return torch.logaddexp(log_a_TB + math.log(share), log_b_TB + math.log1p(-share))
