"""Schedule of the teacher weights over the steps of a run."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SCHEDULES = ("constant", "linear", "cosine")

Floats = NDArray[np.float64]


def scheduled(start_N: Sequence[float], end_N: Sequence[float], schedule: str, progress: float) -> Floats:
    """Return the weights [N] of the teachers, which sum to 1, at a point of the run.

    start_N, end_N  weights at the beginning and at the end; each is normalized before the interpolation
    schedule        constant (start_N), linear, or cosine (half a cosine period from start_N to end_N)
    progress        fraction of the run that is done, from 0 to 1
    Raises ValueError for invalid weights, an unknown schedule, or a progress outside of 0 to 1.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule of weights: expected one of {', '.join(SCHEDULES)}, received {schedule!r}")
    if not 0 <= progress <= 1:
        raise ValueError(f"schedule of weights: expected a progress from 0 to 1, received {progress}")
    if len(start_N) != len(end_N):
        raise ValueError(
            f"schedule of weights: expected {len(start_N)} weights at the end, as at the start, received {len(end_N)}"
        )
    start, end = _normalized("start", start_N), _normalized("end", end_N)
    moved = {"constant": 0.0, "linear": progress, "cosine": (1 - math.cos(math.pi * progress)) / 2}[schedule]
    weights: Floats = (1 - moved) * start + moved * end
    return weights


def _normalized(name: str, weights_N: Sequence[float]) -> Floats:
    weights: Floats = np.array(weights_N, dtype=np.float64)
    if not ((weights >= 0).all() and 0 < weights.sum() < math.inf):
        raise ValueError(f"schedule of weights, {name}: expected numbers ≥ 0 that are not all 0, received {weights_N}")
    weights /= weights.sum()
    return weights
