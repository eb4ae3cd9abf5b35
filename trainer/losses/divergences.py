"""Divergences between a target and the student over buckets: definitions that all share, and construction by name.

A bucket is one listed token or the tail, which stands for all tokens that the target does not list. A divergence is a
function of the target's probabilities p_TB and the student's log-probabilities log_q_TB, with the tail in the last
column. It returns [T] nats (total variation: a probability), 0 where both distributions are equal. It may take one more
keyword argument, `alpha` or `beta`, with a default.

Merging tokens into a bucket never increases a divergence. Each result is therefore a lower bound of the same divergence
over the whole vocabulary, and exact where the tail is empty. A bucket that does not exist has p = 0 and
log q = MIN_LOG_PROB; it contributes nothing.

Reverse KL is infinite where the student has probability and the target has none. A tail of 0 means only that the tail
was too small to be represented, so target probabilities are clamped to MIN_TARGET_PROB inside logarithms. For a true
probability p below it, the result lacks q · log(MIN_TARGET_PROB / p).

Shapes: T positions, B buckets (listed tokens and the tail).
"""

import inspect
import math
from collections.abc import Callable
from functools import partial
from pkgutil import resolve_name

import torch
from torch import Tensor

from trainer.losses import DIVERGENCES

Divergence = Callable[[Tensor, Tensor], Tensor]

MIN_LOG_PROB = -1e4  # e^−10000 underflows to probability 0; a finite value keeps the gradients finite
MIN_TARGET_PROB = 2.0**-24  # resolution of 1 − Σp in float32
MIN_TOTAL = 2.0**-24  # divisor for rows without any probability; all other rows sum to at least 1 before normalization


def divergence(name: str, alpha: float | None = None, beta: float | None = None) -> Divergence:
    """Return the divergence of that name with its parameter set; None keeps the divergence's own default.

    Raises ValueError if the name is not registered, if the divergence does not take a parameter that is given, or if a
    parameter is not between 0 and 1 (both exclusive).
    """
    accepted = divergence_parameters(name)
    given = {key: value for key, value in (("alpha", alpha), ("beta", beta)) if value is not None}
    for key, value in given.items():
        if key not in accepted:
            takes = f"only {', '.join(accepted)}" if accepted else "no parameter"
            raise ValueError(f"divergence {name}: takes {takes}, received {key} = {value}; remove {key}")
        if not 0 < value < 1:
            raise ValueError(f"divergence {name}: expected {key} between 0 and 1, received {value}")
    function: Divergence = resolve_name(DIVERGENCES[name])
    return partial(function, **given) if given else function


def divergence_parameters(name: str) -> tuple[str, ...]:
    """Return the names of the parameters that a divergence takes. Raises ValueError if the name is not registered."""
    if name not in DIVERGENCES:
        raise ValueError(f"divergence: expected one of {', '.join(DIVERGENCES)}, received {name!r}")
    return tuple(inspect.signature(resolve_name(DIVERGENCES[name])).parameters)[2:]


def log_target(p_TB: Tensor) -> Tensor:
    """Return log p with p clamped to MIN_TARGET_PROB."""
    return p_TB.clamp(min=MIN_TARGET_PROB).log()


def log_mixture(log_a_TB: Tensor, log_b_TB: Tensor, weight: float) -> Tensor:
    """Return log(weight · a + (1 − weight) · b), computed from logarithms."""
    return torch.logaddexp(log_a_TB + math.log(weight), log_b_TB + math.log1p(-weight))


def apply_temperature(p_TB: Tensor, temperature: float, num_unlisted_T: Tensor) -> Tensor:
    """Return p^(1/temperature), normalized, where the last bucket stands for `num_unlisted_T` tokens.

    The tail is treated as a uniform distribution over these tokens. For temperatures above 1 a uniform tail maximizes
    the tail's mass after tempering, so a softened target over top-k has too heavy a tail; below 1 it has too light a
    tail.
    """
    if temperature == 1:
        return p_TB
    power = 1 / temperature
    # computed from logarithms: p^power of a small p underflows in float32 where power is large
    log_TB = power * p_TB.log()
    # m tokens of probability p/m each: Σ (p/m)^power = p^power · m^(1 − power)
    log_TB[:, -1] += (1 - power) * num_unlisted_T.clamp(min=1).log()
    raised_TB = (log_TB - log_TB.amax(-1, keepdim=True).clamp(min=MIN_LOG_PROB)).exp()
    return raised_TB / raised_TB.sum(-1, keepdim=True).clamp(min=MIN_TOTAL)
