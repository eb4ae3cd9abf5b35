"""Spans that both tokenizations of a text cut out and that the teacher scored completely."""

import numpy as np
from numpy.typing import NDArray

from alignment.byte_chain import gaps
from alignment.offsets import Cuts, Tokens


def complete_spans(cuts: Cuts, first_row: int, teacher: Tokens) -> NDArray[np.bool_]:
    """Return [B] bool: spans with tokens on both sides, a row for every teacher token and no byte without a token."""
    filled = (np.diff(cuts.teacher) > 0) & (np.diff(cuts.student) > 0)
    complete: NDArray[np.bool_] = filled & (cuts.teacher[:-1] >= first_row) & ~gaps(cuts, teacher)
    return complete
