"""Kernels that validate and compare the rows of teachers, compiled by numba: no GIL, cached after the first call.

`rows` is a TeacherRows tuple: offsets [N, T + 1] into ids [nnz] and probs [nnz], tail [N, T], valid [N, T]. Kernels
unpack it once per position or less often, not once per entry. Kernels do no bounds checks: `validate_and_stack` calls
`first_invalid_row` before any other kernel.

Shapes: N teachers, T positions, V vocabulary, nnz entries of all teachers' rows.
"""

from typing import Any

import numpy as np

from alignment.kernels import Floats, Ints
from kernel_cache.compiled import compiled

MIN_LABEL_PROB = float(np.finfo(np.float32).tiny)  # keeps the bits of an impossible label finite
MASS_TOLERANCE = 1e-4  # allowed error of a row's sum; rows of the alignment are within 1e-6 of 1


@compiled
def first_invalid_row(rows: Any, vocab_size: int) -> Any:
    """Return teacher and position of the first valid row that is not a distribution over distinct ids; −1, −1 if none.

    A distribution has distinct ids from 0 to V − 1, probabilities and a tail ≥ 0, and a sum of 1.
    """
    offsets, ids, probs, tail, valid = rows
    # seen[token] is the stamp of the last row that lists the token; a new stamp per row avoids clearing the array
    seen = np.zeros(vocab_size, dtype=np.int64)
    stamp = 0
    for n in range(valid.shape[0]):
        for t in range(valid.shape[1]):
            if not valid[n, t]:
                continue
            stamp += 1
            total = np.float64(tail[n, t])
            is_distribution = tail[n, t] >= 0
            for e in range(offsets[n, t], offsets[n, t + 1]):
                token = ids[e]
                if token < 0 or token >= vocab_size:  # must return before seen[token] is accessed
                    return n, t
                is_distribution &= seen[token] != stamp and probs[e] >= 0
                seen[token] = stamp
                total += probs[e]
            if offsets[n, t + 1] - offsets[n, t] == vocab_size:
                is_distribution &= tail[n, t] <= MASS_TOLERANCE  # no token is left for the tail
            # written so that a NaN in the row makes the condition true
            if not (is_distribution and abs(total - 1.0) <= MASS_TOLERANCE):
                return n, t
    return -1, -1


@compiled
def label_probs(rows: Any, labels: Ints) -> Floats:
    """Return the probability [N, T] of the label, at least MIN_LABEL_PROB; 1 where the teacher's row is not valid.

    A label that is not listed has the whole tail, an upper bound of its probability.
    """
    offsets, ids, probs, tail, valid = rows
    out = np.ones(valid.shape)
    for n in range(valid.shape[0]):
        for t in range(valid.shape[1]):
            if valid[n, t]:
                prob = tail[n, t]  # kept if the loop finds no entry with the label
                for e in range(offsets[n, t], offsets[n, t + 1]):
                    if ids[e] == labels[t]:
                        prob = probs[e]
                        break
                out[n, t] = max(np.float64(prob), MIN_LABEL_PROB)
    return out


@compiled
def entropies(rows: Any, logs: Floats) -> Floats:
    """Return the entropy [N, T] of each row in nats, Σ −p · log p with the tail as one bucket; 0 for invalid rows.

    `logs` [nnz] are the logarithms of probs, computed by numpy beforehand because numpy vectorizes them.
    """
    offsets, _, probs, tail, valid = rows
    out = np.zeros(valid.shape)
    for n in range(valid.shape[0]):
        for t in range(valid.shape[1]):
            if valid[n, t]:
                nats = 0.0
                for e in range(offsets[n, t], offsets[n, t + 1]):
                    if probs[e] > 0:  # 0 · log 0 = 0, but 0 · −inf is NaN
                        nats -= probs[e] * logs[e]
                if tail[n, t] > 0:
                    nats -= tail[n, t] * np.log(np.float64(tail[n, t]))
                out[n, t] = nats
    return out
