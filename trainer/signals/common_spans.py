"""Common spans of two tokenizations of a text: the text between two neighboring common boundaries."""

import numpy as np
from numpy.typing import NDArray

from alignment.byte_chain import gaps
from alignment.offsets import Cuts, Tokens


def complete_spans(cuts: Cuts, first_row: int, teacher: Tokens) -> NDArray[np.bool_]:
    """Return [B] bool: whether the teacher scored a span completely.

    Such a span contains tokens of teacher and student, has a row for each of its teacher tokens, and has no byte
    outside of the teacher's tokens.
    """
    filled = (np.diff(cuts.teacher) > 0) & (np.diff(cuts.student) > 0)
    complete: NDArray[np.bool_] = filled & (cuts.teacher[:-1] >= first_row) & ~gaps(cuts, teacher)
    return complete
