"""Checks of the top K candidates of a position, for all dialects without the native wire format."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from teachers.protocol.errors import InvalidRows
from teachers.protocol.kernels import MASS_TOLERANCE


@dataclass(frozen=True)
class RowPosition:
    """Index of a sequence and position of its first row, for error messages."""

    index: int
    start: int

    def error(self, row: int, fault: str) -> InvalidRows:
        return InvalidRows(f"sequence {self.index}, position {self.start + row}: {fault}")


def tail_of(logprobs: NDArray[np.float64], vocab_size: int, first: RowPosition, remedy: str) -> NDArray[np.float32]:
    """Return the tail [S]. Raises InvalidRows for values that are not log-probabilities, such as logits.

    logprobs  [S, K] nats, descending
    remedy    what to change on the server, for the message

    The whole vocabulary has mass 1, and the candidates have at most this mass. No unlisted token is more probable than
    the last candidate. If each of them counts as much as the last candidate, the total is therefore at least 1.
    Candidates of probability 0 do not count as the last one: a server may have excluded these tokens afterwards.
    """
    with np.errstate(over="ignore"):
        probs = np.exp(logprobs)
        mass = probs.sum(axis=1)
        last = np.where(probs > 0, probs, np.inf).min(axis=1)
        upper_bound = mass + np.where(np.isinf(last), 0, last) * (vocab_size - probs.shape[1])
    wrong = (mass > 1 + MASS_TOLERANCE) | (upper_bound < 1 - MASS_TOLERANCE)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise first.error(
            row,
            f"expected log-probabilities, but the {probs.shape[1]} candidates have mass {mass[row]:.3g} and all tokens "
            f"together at most {upper_bound[row]:.3g}, not 1: {remedy}",
        )
    tail: NDArray[np.float64] = np.maximum(1.0 - mass, 0.0)
    return tail.astype(np.float32)
