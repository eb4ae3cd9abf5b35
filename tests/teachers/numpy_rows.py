"""The reference of teachers/protocol/kernels.py in numpy: one pass over all rows per check. For tests only."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teachers.protocol.errors import InvalidRows
from teachers.protocol.kernels import HALF_ULP, MASS_TOLERANCE, MAX_RESCALE
from teachers.protocol.rows import Rows


def decode_with_numpy(rows: Rows, actual_ids: NDArray[np.uint32], vocab_size: int, ulp: float = HALF_ULP) -> Rows:
    """Rows as they arrive in half precision, checked, their mass restored. Raises InvalidRows."""
    for name, wrong in _faults(rows, actual_ids, vocab_size, ulp):
        if wrong.any():
            raise InvalidRows(f"sequence 0, position {rows.start + int(np.flatnonzero(wrong)[0])}: {name}")
    probs = np.exp(rows.logprobs.astype(np.float64))
    is_actual = rows.ids == actual_ids[:, None]
    others = np.where(is_actual, 0.0, probs).sum(axis=1)
    wanted = 1.0 - rows.tail.astype(np.float64)
    wanted -= np.where(is_actual.any(axis=1), np.exp(rows.actual.astype(np.float64)), 0.0)
    scale = np.clip(
        np.divide(wanted, others, out=np.ones_like(others), where=others > 0), 1 - MAX_RESCALE, 1 + MAX_RESCALE
    )
    shifted = rows.logprobs + np.log(scale)[:, None]
    logprobs = np.where(is_actual, rows.actual[:, None], np.minimum(shifted, 0.0)).astype(np.float32)
    return Rows(rows.start, rows.ids, logprobs, rows.actual, rows.tail)


def _faults(rows: Rows, actual_ids: NDArray[np.uint32], vocab_size: int, ulp: float) -> Iterator[tuple[str, Any]]:
    """Each fault by name with [S] bool, true where it is found; the gravest first."""
    finite = np.isfinite(rows.logprobs).all(axis=1) & np.isfinite(rows.actual) & np.isfinite(rows.tail)
    yield "a value that is not finite", ~finite
    yield "a positive log-probability", (rows.logprobs > 0).any(axis=1) | (rows.actual > 0)
    yield "candidates that are not in descending order", (np.diff(rows.logprobs, axis=1) > 0).any(axis=1)
    yield f"a token id outside the vocabulary of {vocab_size}", (rows.ids >= vocab_size).any(axis=1)
    ids = np.sort(rows.ids, axis=1)
    yield "a candidate that is listed twice", (ids[:, 1:] == ids[:, :-1]).any(axis=1)
    yield "a tail below 0", rows.tail < -MASS_TOLERANCE
    probs = np.exp(rows.logprobs.astype(np.float64))
    rounding = MASS_TOLERANCE + (probs * np.abs(rows.logprobs)).sum(axis=1) * ulp
    yield "listed mass and tail that do not sum to 1", np.abs(probs.sum(axis=1) + rows.tail - 1) > rounding
    is_actual = rows.ids == actual_ids[:, None]
    gap = np.abs(rows.logprobs - rows.actual[:, None])
    rounding = MASS_TOLERANCE + np.abs(rows.actual) * ulp
    yield (
        "an actual token whose log-probability contradicts its listed one",
        (is_actual & (gap > rounding[:, None])).any(axis=1),
    )
    unlisted = ~is_actual.any(axis=1) & (np.exp(rows.actual) > rows.tail + MASS_TOLERANCE)
    yield "an unlisted actual token that is more probable than the whole tail", unlisted
