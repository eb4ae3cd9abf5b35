"""Read a log-probability of −∞ from JSON. JSON has no such number, and every server writes it differently.

vLLM writes −9999, others −10,000, the least float, null, or the literal -Infinity, which is not JSON. All of them mean
probability 0. The rows of every dialect have LEAST_LOGPROB instead, as those of the native protocol.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teachers.protocol.rows import LEAST_LOGPROB

FLOOR = -1000.0  # no log-probability of a model is that low: e^−1000 is 0 in float64
_INFINITY = re.compile(rb'("logprobs?"\s*:\s*)-Infinity\b')


def finite_logprobs(values: Sequence[float | None] | NDArray[np.float32]) -> NDArray[np.float64]:
    """Return log-probabilities in nats [N], with LEAST_LOGPROB for null and for values up to FLOOR."""
    logprobs = np.array(values, dtype=np.float64)  # None becomes NaN
    logprobs[~(logprobs > FLOOR)] = LEAST_LOGPROB
    return logprobs


def zeros_last(logprobs: NDArray[np.float64], ids: NDArray[np.uint32]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Move candidates [S, K] of probability 0 behind the others. A server may rank tokens before it excludes some."""
    order = np.argsort(logprobs == LEAST_LOGPROB, axis=1, kind="stable")
    return np.take_along_axis(logprobs, order, 1), np.take_along_axis(ids, order, 1)


def infinity_as_null(data: bytes) -> bytes:
    """Replace the literal -Infinity of a logprob by null, so that the data are valid JSON."""
    return _INFINITY.sub(rb"\1null", data) if b"-Infinity" in data else data
