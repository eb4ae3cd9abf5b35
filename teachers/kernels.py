"""The loops that read a teacher's rows, compiled by numba: each row is checked and its mass restored while it is hot.

rows.py says what is checked and why. A float16 has 65,536 values, so its probability is a table lookup. A candidate
that is listed twice is found in a small hash table whose slots carry the row's stamp, so that it is never cleared.

Legend: S rows, K candidates.
"""

from typing import Any

import numpy as np
from numba import njit

HALF_ULP = 2.0**-11  # relative rounding of a float16, so p·|log p|·HALF_ULP is what it may add to a row's mass
FLOAT_ULP = 2.0**-24  # the same of a float32
MOST = 2.0**-6  # largest relative rounding of a probability above e^−32
MASS_TOLERANCE = 1e-4  # what the engine's own float32 sums may be off by
LARGEST = float(np.finfo(np.float32).max)

SOUND, NOT_FINITE, POSITIVE, UNSORTED, OUTSIDE, TWICE, NEGATIVE_TAIL, MASS, CONTRADICTED, UNLISTED = range(10)
FAULTS = (  # of several in one answer the first of this order is named
    "sound",
    "a value that is not finite",
    "a positive log-probability",
    "candidates that are not in descending order",
    "a token id outside the vocabulary of {vocab_size}",
    "a candidate that is listed twice",
    "a tail below 0",
    "listed mass and tail that do not sum to 1",
    "an actual token that contradicts its own listing",
    "an unlisted actual token that is likelier than the whole tail",
)


def _compiled(function: Any) -> Any:
    """numba's njit without the lock, cached where a cache can be written."""
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # neither this folder nor the user's cache can be written
        return njit(nogil=True)(function)


def half_table() -> Any:
    """The log-probability (float32) and the probability (float64) of each of the 65,536 float16 bit patterns."""
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    with np.errstate(invalid="ignore"):  # some are NaN
        logprobs = values.astype(np.float32)
        return logprobs, np.exp(np.minimum(logprobs, 0.0).astype(np.float64))


@_compiled
def read_halves(halves: Any, ids: Any, exact: Any, text: Any, table: Any) -> Any:
    """Float32 log-probabilities [S, K] of rows [S, K] of float16 bits, their mass restored; a fault and its row.

    `exact`: log-probability of the actual token and tail, [S] each. `text`: the actual ids [S], the vocabulary's size.

    The actual token and the tail arrive exactly, so the other candidates are scaled, by no more than their rounding,
    until the row sums to 1. Without it a row can exceed 1 by 0.002.
    """
    actual, tail = exact
    num_rows, top_k = ids.shape
    out = np.empty((num_rows, top_k), dtype=np.float32)
    probs, seen = np.empty(top_k), _empty(top_k)
    worst, where = SOUND, 0
    for s in range(num_rows):
        logprobs = out[s]
        for k in range(top_k):
            logprobs[k] = table[0][halves[s, k]]
            probs[k] = table[1][halves[s, k]]
        row = (actual[s], tail[s], HALF_ULP)
        fault, listed, others = _judge(ids[s], logprobs, probs, row, (text[0][s], text[1], s + 1), seen)
        if fault != SOUND and (worst == SOUND or fault < worst):
            worst, where = fault, s
        if worst == SOUND:
            _restore(logprobs, row, listed, others)
    return out, worst, where


@_compiled
def check_floats(logprobs: Any, ids: Any, exact: Any, text: Any) -> Any:
    """The fault of float32 rows [S, K], as they are, and its row."""
    actual, tail = exact
    num_rows, top_k = ids.shape
    probs, seen = np.empty(top_k), _empty(top_k)
    worst, where = SOUND, 0
    for s in range(num_rows):
        for k in range(top_k):
            probs[k] = np.exp(np.float64(logprobs[s, k]))
        row = (actual[s], tail[s], FLOAT_ULP)
        fault, _, _ = _judge(ids[s], logprobs[s], probs, row, (text[0][s], text[1], s + 1), seen)
        if fault != SOUND and (worst == SOUND or fault < worst):
            worst, where = fault, s
    return worst, where


@_compiled
def _judge(ids: Any, logprobs: Any, probs: Any, row: Any, text: Any, seen: Any) -> Any:
    """One row's fault, where the actual token is listed (−1: nowhere), and the mass of the other candidates."""
    actual, tail, ulp = row
    token, vocab_size, stamp = text
    listed = -1
    finite = np.isfinite(actual) and np.isfinite(tail)
    positive, unsorted, outside = actual > 0.0, False, False
    others, rounding, before = 0.0, 0.0, np.float32(LARGEST)
    for k in range(len(ids)):
        finite &= abs(logprobs[k]) <= LARGEST
        positive |= logprobs[k] > 0.0
        unsorted |= logprobs[k] > before
        before = logprobs[k]
        outside |= ids[k] >= vocab_size
        if ids[k] == token:
            listed = k
        else:  # not the mass less its own: a likely token would leave nothing but rounding of the others
            others += probs[k]
        rounding -= probs[k] * logprobs[k]
    own, mass = (logprobs[listed], others + probs[listed]) if listed >= 0 else (actual, others)
    if not finite:
        fault = NOT_FINITE
    elif positive:
        fault = POSITIVE
    elif unsorted:
        fault = UNSORTED
    elif outside:
        fault = OUTSIDE
    elif _twice(ids, stamp, seen):
        fault = TWICE
    elif tail < -MASS_TOLERANCE:
        fault = NEGATIVE_TAIL
    elif abs(mass + tail - 1.0) > MASS_TOLERANCE + rounding * ulp:
        fault = MASS
    elif abs(own - actual) > MASS_TOLERANCE + abs(actual) * ulp:
        fault = CONTRADICTED
    elif listed < 0 and np.exp(actual) > tail + MASS_TOLERANCE:
        fault = UNLISTED
    else:
        fault = SOUND
    return fault, listed, others


@_compiled
def _empty(top_k: int) -> Any:
    """A hash table for a row's K ids: at most a quarter of it is ever taken. Stamps begin at 1."""
    size = 16
    while size < 4 * top_k:
        size *= 2
    return np.zeros(size, dtype=np.uint64)


@_compiled
def _twice(ids: Any, stamp: int, seen: Any) -> bool:
    """Whether an id stands twice. A slot holds stamp · 2³² + id, and is free unless its stamp is this row's."""
    mask = np.uint64(len(seen) - 1)
    mark = np.uint64(stamp) << np.uint64(32)
    for k in range(len(ids)):
        key = mark | np.uint64(ids[k])
        slot = (key * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)) & mask
        while seen[slot] >= mark:
            if seen[slot] == key:
                return True
            slot = (slot + np.uint64(1)) & mask
        seen[slot] = key
    return False


@_compiled
def _restore(logprobs: Any, row: Any, listed: int, others: float) -> None:
    """Scale the candidates but the actual one, in place, until the row sums to 1."""
    actual, tail, _ = row
    wanted = 1.0 - tail
    if listed >= 0:
        wanted -= np.exp(np.float64(actual))
    scale = min(max(wanted / others, 1.0 - MOST), 1.0 + MOST) if others > 0.0 else 1.0
    shift = np.log(scale)
    for k in range(len(logprobs)):
        logprobs[k] = min(logprobs[k] + shift, 0.0)
    if listed >= 0:
        logprobs[listed] = actual
