"""Kernels of arithmetic and geometric means, compiled by numba: no GIL, cached after the first call.

Rows of one position are summed in a scratch array over the vocabulary. The list of touched tokens becomes the fused row
and resets the scratch array, so the cost of a position is proportional to its entries, not to the vocabulary.

`rows` is a TeacherRows tuple that `first_invalid_row` has validated; see kernels.py. `cut` is a tuple of top_k and the
id that the cut keeps at each position [T], or NO_ID.

Shapes: N teachers, T positions, V vocabulary, nnz entries of all teachers' rows.
"""

from typing import Any

import numpy as np

from alignment.kernels import Floats, Ints
from kernel_cache.compiled import compiled

NO_ID = -1
NO_TAIL = 64  # exceeds the number of teachers, so that one counter holds two counts (see `_sum_logs`)


@compiled
def _select(keys: Any, size: int, top_k: int) -> None:
    """Move the `top_k` largest of keys[:size] to the front (quickselect; keys are distinct).

    The smallest of them is the last, at index top_k − 1; the others are in no particular order.
    """
    # invariant: keys before `low` are larger than those in [low, high], which are larger than those after `high`;
    # index top_k − 1 is within [low, high]
    low, high = 0, size - 1
    while low < high:
        a, b, c = keys[low], keys[(low + high) // 2], keys[high]
        pivot = max(min(a, b), min(max(a, b), c))  # median of three
        # Hoare partition in descending order: keys before i are ≥ pivot, keys after j are ≤ pivot
        i, j = low, high
        while i <= j:
            while keys[i] > pivot:
                i += 1
            while keys[j] < pivot:
                j -= 1
            if i <= j:
                keys[i], keys[j] = keys[j], keys[i]
                i += 1
                j -= 1
        # now [low, j] ≥ pivot, [i, high] ≤ pivot, and at most one key, the pivot, between them
        if top_k - 1 <= j:
            high = j
        elif top_k - 1 >= i:
            low = i
        else:  # index top_k − 1 is the pivot, which is in its final position
            return


@compiled
def _keep(keys: Any, size: int, top_k: int, wanted: Any) -> None:
    """Exchange the last of the `top_k` selected keys for `wanted`, if `wanted` is among the keys cut."""
    for i in range(top_k, size):
        if keys[i] == wanted:
            keys[top_k - 1], keys[i] = keys[i], keys[top_k - 1]
            return


@compiled
def _write(row: Any, size: int, cut: Any, out: Any, used: int) -> Any:
    """Write the summed row after entry `used` and reset the scratch array. Returns the entries used and the mass cut.

    `cut` is a tuple of top_k and the id that the cut keeps at this position, or NO_ID.

    Entries are compared by 64-bit keys: the bits of the float32 probability above the inverted id. The bits of positive
    floats, read as integers, have the same order as the floats, and the inverted id prefers the lowest id among equals.
    """
    (scratch, touched, keys, single, bits), (ids, probs), (top_k, kept_id) = row, out, cut
    kept, wanted, mass_cut = 0, np.uint64(0), 0.0
    for i in range(size):
        token = touched[i]
        single[0] = scratch[token]  # rounds to float32; `bits` is a view of the same memory
        scratch[token] = 0.0
        keys[kept] = (np.uint64(bits[0]) << np.uint64(32)) | np.uint64(np.uint32(0xFFFFFFFF) - np.uint32(token))
        if token == kept_id:
            wanted = keys[kept]
        kept += bits[0] != 0  # an entry that rounds to 0 is overwritten by the next
    if kept > top_k:
        _select(keys, kept, top_k)
        if 0 < wanted < keys[top_k - 1]:
            _keep(keys, kept, top_k, wanted)
    for i in range(kept):  # keys[:top_k] are kept, the others add to the tail
        bits[0] = np.uint32(keys[i] >> np.uint64(32))
        if i < top_k:
            ids[used] = np.uint32(0xFFFFFFFF) - np.uint32(keys[i] & np.uint64(0xFFFFFFFF))
            probs[used] = single[0]
            used += 1
        else:
            mass_cut += single[0]
    return used, mass_cut


@compiled
def _new_row(num_entries: int, vocab_size: int) -> Any:
    """Allocate the scratch array [V], touched tokens, sort keys, and one float32 with a view of its bits.

    One entry more than the maximum: the loops write before they decide whether to keep an entry.
    """
    most = min(num_entries, vocab_size)
    single = np.zeros(1, dtype=np.float32)
    return (
        np.zeros(vocab_size),
        np.empty(most + 1, dtype=np.int32),
        np.empty(most + 1, dtype=np.uint64),
        single,
        single.view(np.uint32),
    )


@compiled
def _new_out(offsets: Ints, top_k: int) -> Any:
    """Allocate offsets [T + 1], ids and probs for all fused entries, and tail [T].

    Returns them with the largest number of entries that all teachers list together at one position.
    """
    num_t = offsets.shape[1] - 1
    capacity, most = 0, 0
    for t in range(num_t):
        entries = (offsets[:, t + 1] - offsets[:, t]).sum()
        capacity += min(entries, top_k)
        most = max(most, entries)
    ids, probs = np.empty(capacity, dtype=np.int32), np.empty(capacity, dtype=np.float32)
    return np.zeros(num_t + 1, dtype=np.int64), ids, probs, np.zeros(num_t, dtype=np.float32), most


@compiled
def _sum_probs(rows: Any, weights: Floats, t: int, scratch: Floats, touched: Any) -> Any:
    """Add Σ w·p of one position to the scratch array. Returns the number of touched tokens and the tail Σ w·tail."""
    offsets, ids, probs, tail, _ = rows
    size, rest = 0, 0.0
    for n in range(weights.shape[0]):
        weight = weights[n, t]
        if weight > 0:
            rest += weight * tail[n, t]
            for e in range(offsets[n, t], offsets[n, t + 1]):
                prob = weight * probs[e]
                if prob > 0:  # scratch[token] == 0 must mean that the token is new
                    token = ids[e]
                    touched[size] = token  # kept only if the token is new; otherwise overwritten by the next
                    size += scratch[token] == 0.0
                    scratch[token] += prob
    return size, rest


@compiled
def mean_rows(rows: Any, weights: Floats, cut: Any, vocab_size: int) -> Any:
    """Compute the arithmetic mean Σ w·p of every position: offsets [T + 1], ids, probs, tail [T].

    `weights` [N, T] sum to 1, or to 0 where the result is not valid. The tail is Σ w·tail plus the mass cut by top_k.
    """
    top_k, kept_ids = cut
    offsets, ids, probs, tail, most = _new_out(rows[0], top_k)
    row = _new_row(most, vocab_size)
    used = 0
    for t in range(len(tail)):
        size, rest = _sum_probs(rows, weights, t, row[0], row[1])
        used, mass_cut = _write(row, size, (top_k, kept_ids[t]), (ids, probs), used)
        offsets[t + 1], tail[t] = used, rest + mass_cut
    return offsets, ids[:used].copy(), probs[:used].copy(), tail


@compiled
def _sum_logs(rows: Any, logs: Floats, weights: Floats, t: int, log_row: Any) -> Any:
    """Sum the weighted logarithms of one position.

    u = tail / number of unlisted ids is the probability that a teacher gives to each id that it does not list. The
    product over teachers of an id's p^w is exp(base + Σ w·(log p − log u)), where the sum covers only the teachers that
    list the id and base = Σ w·log u covers all teachers. The scratch array holds the inner sum, so ids that no teacher
    lists need no work.

    For a teacher without a tail, log u would be −inf. It is replaced by 0, and an id is possible only if every such
    teacher lists it: `listers` counts the teachers that list an id, plus NO_TAIL for each of those without a tail.

    Returns the number of touched ids, base, and the number of teachers without a tail.
    """
    offsets, ids, _, tail, _ = rows
    scratch, touched, listers = log_row
    size, base, num_without_tail = 0, 0.0, 0
    for n in range(weights.shape[0]):
        weight = weights[n, t]
        if weight > 0:
            unlisted = len(scratch) - (offsets[n, t + 1] - offsets[n, t])
            has_tail = unlisted > 0 and tail[n, t] > 0
            log_u = np.log(tail[n, t] / np.float64(unlisted)) if has_tail else 0.0
            base += weight * log_u
            num_without_tail += not has_tail
            for e in range(offsets[n, t], offsets[n, t + 1]):
                token = ids[e]
                touched[size] = token  # kept only if the id is new; the scratch value may be 0 for a listed id
                size += listers[token] == 0
                listers[token] += 1 if has_tail else NO_TAIL + 1
                scratch[token] += weight * (logs[e] - log_u)
    return size, base, num_without_tail


@compiled
def _normalize_logs(log_row: Any, size: int, base: float, num_without_tail: int) -> Any:
    """Turn the summed logarithms into normalized probabilities, in place, and reset the listers.

    Returns the probability of all ids that no teacher lists, and False if no id is possible at this position. Each such
    id has the product exp(base), provided that no teacher lacks a tail.
    """
    scratch, touched, listers = log_row
    unlisted = len(scratch) - size
    # first pass: complete the logarithms and find the largest, which is subtracted to avoid underflow
    best = base if num_without_tail == 0 and unlisted > 0 else -np.inf
    for i in range(size):
        token = touched[i]
        if listers[token] // NO_TAIL == num_without_tail:  # every teacher without a tail lists this id
            scratch[token] += base
            best = max(best, scratch[token])
        else:
            scratch[token] = -np.inf
        listers[token] = 0
    # second pass: exponentiate and sum; if no id is possible, the scratch array is only reset
    any_possible = best > -np.inf
    rest = unlisted * np.exp(base - best) if any_possible and num_without_tail == 0 else 0.0
    total = rest
    for i in range(size):
        token = touched[i]
        scratch[token] = np.exp(scratch[token] - best) if any_possible else 0.0
        total += scratch[token]
    if any_possible:
        for i in range(size):
            scratch[touched[i]] /= total
        rest /= total
    return rest, any_possible


@compiled
def geometric_rows(rows: Any, logs: Floats, weights: Floats, cut: Any, vocab_size: int) -> Any:
    """Compute the geometric mean Π p^w of every position, normalized over the vocabulary.

    Returns the same arrays as `mean_rows`, and the number of fallbacks: positions where no token is possible for all
    teachers, so that the arithmetic mean is used. `logs` [nnz] are the logarithms of probs.
    """
    top_k, kept_ids = cut
    offsets, ids, probs, tail, most = _new_out(rows[0], top_k)
    row = _new_row(most, vocab_size)
    log_row = (row[0], row[1], np.zeros(vocab_size, dtype=np.int32))
    used, num_fallbacks = 0, 0
    for t in range(len(tail)):
        if weights[:, t].sum() > 0:  # otherwise the result is not valid and the row stays empty
            size, base, num_without_tail = _sum_logs(rows, logs, weights, t, log_row)
            rest, any_possible = _normalize_logs(log_row, size, base, num_without_tail)
            if not any_possible:
                num_fallbacks += 1
                size, rest = _sum_probs(rows, weights, t, row[0], row[1])
            used, mass_cut = _write(row, size, (top_k, kept_ids[t]), (ids, probs), used)
            tail[t] = rest + mass_cut
        offsets[t + 1] = used
    return offsets, ids[:used].copy(), probs[:used].copy(), tail, num_fallbacks
