"""Compiled loops (numba) that decode the rows of a score response, check every row and restore its probability mass.

wire_format.py describes the format. A float16 has 65,536 values, so a table contains the probability of each.
Duplicate candidates are found with a small hash table. Its entries carry the number of the row, so that it is not
cleared between rows. Checking a row directly after decoding it keeps the row in the CPU cache.

Legend: S rows, K candidates.
"""

from typing import Any

import numpy as np

from kernel_cache.compiled import compiled

HALF_ULP = 2.0**-11  # relative rounding error of a float16; p·|log p|·HALF_ULP is its effect on the mass of a row
FLOAT_ULP = 2.0**-24  # relative rounding error of a float32
MAX_RESCALE = 2.0**-6  # largest relative rounding error of a probability above e^−32
MASS_TOLERANCE = 1e-4  # tolerance for the engine's own float32 sums
LARGEST = float(np.finfo(np.float32).max)

(
    VALID, NOT_FINITE, POSITIVE, UNSORTED, OUT_OF_VOCABULARY, DUPLICATE, NEGATIVE_TAIL, WRONG_MASS, CONTRADICTION,
    IMPOSSIBLE_ACTUAL,
) = range(10)  # fmt: skip
FAULTS = (  # a response with several faults is rejected for the first one in this order
    "valid",
    "a value that is not finite",
    "a positive log-probability",
    "candidates that are not in descending order",
    "a token id outside the vocabulary of {vocab_size}",
    "a candidate that is listed twice",
    "a tail below 0",
    "listed mass and tail that do not sum to 1",
    "an actual token whose log-probability contradicts its listed one",
    "an unlisted actual token that is more probable than the whole tail",
)


def half_table() -> Any:
    """Return log-probability (float32) and probability (float64) of each of the 65,536 float16 bit patterns."""
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    with np.errstate(invalid="ignore"):  # some patterns are NaN
        logprobs = values.astype(np.float32)
        return logprobs, np.exp(np.minimum(logprobs, 0.0).astype(np.float64))


@compiled
def decode_rows(halves: Any, ids: Any, exact: Any, text: Any, table: Any) -> Any:
    """Decode float16 rows, check them and restore their mass.

    halves  [S, K] float16 bit patterns
    ids     [S, K] candidate ids
    exact   log-probability of the actual token [S] and tail [S], both float32
    text    actual ids [S] and the vocabulary size

    Returns float32 log-probabilities [S, K], the worst fault and the row of that fault.

    Actual token and tail arrive in float32. The other candidates are scaled by one factor per row, within their
    rounding error, until the row sums to 1. Without this a row can exceed 1 by 0.002.
    """
    actual, tail = exact
    num_rows, top_k = ids.shape
    out = np.empty((num_rows, top_k), dtype=np.float32)
    probs, seen = np.empty(top_k), _new_hash_table(top_k)
    worst, worst_row = VALID, 0
    for s in range(num_rows):
        logprobs = out[s]
        for k in range(top_k):
            logprobs[k] = table[0][halves[s, k]]
            probs[k] = table[1][halves[s, k]]
        row = (actual[s], tail[s], HALF_ULP)
        fault, listed, other_mass = _check_row(ids[s], logprobs, probs, row, (text[0][s], text[1], s + 1), seen)
        if fault != VALID and (worst == VALID or fault < worst):
            worst, worst_row = fault, s
        if worst == VALID:  # after a fault the result is discarded
            _rescale(logprobs, row, listed, other_mass)
    return out, worst, worst_row


@compiled
def check_float_rows(logprobs: Any, ids: Any, exact: Any, text: Any) -> Any:
    """Check float32 rows [S, K] without changing them. Returns the worst fault and its row; see decode_rows."""
    actual, tail = exact
    num_rows, top_k = ids.shape
    probs, seen = np.empty(top_k), _new_hash_table(top_k)
    worst, worst_row = VALID, 0
    for s in range(num_rows):
        for k in range(top_k):
            probs[k] = np.exp(np.float64(logprobs[s, k]))
        row = (actual[s], tail[s], FLOAT_ULP)
        fault, _, _ = _check_row(ids[s], logprobs[s], probs, row, (text[0][s], text[1], s + 1), seen)
        if fault != VALID and (worst == VALID or fault < worst):
            worst, worst_row = fault, s
    return worst, worst_row


@compiled
def _check_row(ids: Any, logprobs: Any, probs: Any, row: Any, text: Any, seen: Any) -> Any:
    """Check one row.

    row   log-probability of the actual token, tail, relative rounding error of `logprobs`
    text  actual id, vocabulary size, number of the row for the hash table `seen`

    Returns the fault, the index of the actual token among the candidates (−1: unlisted) and the mass of the others.

    Tolerances: the mass of a row may deviate from 1 by MASS_TOLERANCE + Σ p·|log p|·ulp, the effect of the rounding of
    log p on p; a listed log-probability of the actual token by MASS_TOLERANCE + |log p|·ulp.
    """
    actual, tail, ulp = row
    token, vocab_size, row_number = text
    listed = -1
    finite = np.isfinite(actual) and np.isfinite(tail)
    positive, unsorted, out_of_vocabulary = actual > 0.0, False, False
    other_mass, rounding, previous = 0.0, 0.0, np.float32(LARGEST)
    for k in range(len(ids)):  # invariant: the flags and sums cover the candidates 0 … k
        finite &= abs(logprobs[k]) <= LARGEST
        positive |= logprobs[k] > 0.0
        unsorted |= logprobs[k] > previous
        previous = logprobs[k]
        out_of_vocabulary |= ids[k] >= vocab_size
        if ids[k] == token:
            listed = k
        else:  # summed directly: mass − p(actual) would cancel to rounding noise for a probable actual token
            other_mass += probs[k]
        rounding -= probs[k] * logprobs[k]
    own, mass = (logprobs[listed], other_mass + probs[listed]) if listed >= 0 else (actual, other_mass)
    if not finite:
        fault = NOT_FINITE
    elif positive:
        fault = POSITIVE
    elif unsorted:
        fault = UNSORTED
    elif out_of_vocabulary:
        fault = OUT_OF_VOCABULARY
    elif _has_duplicate(ids, row_number, seen):
        fault = DUPLICATE
    elif tail < -MASS_TOLERANCE:
        fault = NEGATIVE_TAIL
    elif abs(mass + tail - 1.0) > MASS_TOLERANCE + rounding * ulp:
        fault = WRONG_MASS
    elif abs(own - actual) > MASS_TOLERANCE + abs(actual) * ulp:
        fault = CONTRADICTION
    elif listed < 0 and np.exp(actual) > tail + MASS_TOLERANCE:  # an unlisted token is part of the tail
        fault = IMPOSSIBLE_ACTUAL
    else:
        fault = VALID
    return fault, listed, other_mass


@compiled
def _new_hash_table(top_k: int) -> Any:
    """Return an empty hash table of a power of two slots, at most a quarter of which K ids fill."""
    size = 16
    while size < 4 * top_k:
        size *= 2
    return np.zeros(size, dtype=np.uint64)


@compiled
def _has_duplicate(ids: Any, row_number: int, seen: Any) -> bool:
    """Return whether an id occurs twice in the row.

    A used slot holds row_number · 2³² + id, and row numbers start at 1 and increase. A slot below this row's mark is
    therefore free, and the table needs no clearing. Collisions are resolved by linear probing; at least three quarters
    of the slots are free, so the probing ends.
    """
    mask = np.uint64(len(seen) - 1)
    mark = np.uint64(row_number) << np.uint64(32)
    for k in range(len(ids)):  # invariant: the ids 0 … k − 1 are distinct and in the table
        key = mark | np.uint64(ids[k])
        slot = (key * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)) & mask  # Fibonacci hashing
        while seen[slot] >= mark:
            if seen[slot] == key:
                return True
            slot = (slot + np.uint64(1)) & mask
        seen[slot] = key
    return False


@compiled
def _rescale(logprobs: Any, row: Any, listed: int, other_mass: float) -> None:
    """Scale all candidates but the actual token, in place, so that the row sums to 1.

    The factor is (1 − tail − p(actual)) / other_mass, where p(actual) counts only if it is listed. It is limited to
    1 ± MAX_RESCALE: rounding cannot explain more. In log space it is one added constant; the order does not change.
    """
    actual, tail, _ = row
    expected = 1.0 - tail
    if listed >= 0:
        expected -= np.exp(np.float64(actual))
    scale = min(max(expected / other_mass, 1.0 - MAX_RESCALE), 1.0 + MAX_RESCALE) if other_mass > 0.0 else 1.0
    shift = np.log(scale)
    for k in range(len(logprobs)):
        logprobs[k] = min(logprobs[k] + shift, 0.0)
    if listed >= 0:
        logprobs[listed] = actual
