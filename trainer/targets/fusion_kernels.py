"""The loops of fusion, compiled by numba: no Python object, no lock, cached on disk after the first call.

fusion.py says what is computed and why. A row is gathered in a scratch array over the vocabulary, the list of touched
tokens becomes the row and clears the scratch: the cost of a position is its entries, never the vocabulary.

`rows` is a tuple of all teachers' rows, one teacher after another: offsets [N, T + 1] into ids [nnz] and probs [nnz],
tail [N, T], valid [N, T]. It is taken apart once a row, not once an entry.

Legend: N teachers, T positions, V vocabulary.
"""

from typing import Any

import numpy as np

from alignment.compiled import compiled
from alignment.kernels import Floats, Ints

FLOOR = float(np.finfo(np.float32).tiny)  # the least probability that a text is taken to have
SLACK = 1e-4  # by how much float32 rows may miss a sum of 1; alignment's rows miss it by less than 1e-6
STRICT = 64  # in a count of listers: one whose tail is 0, so that an id that it does not list cannot be


@compiled
def first_fault(rows: Any, vocab_size: int) -> Any:
    """Teacher and position of the first valid row that is no distribution over distinct ids below V; −1, −1 if none."""
    offsets, ids, probs, tail, valid = rows
    seen = np.zeros(vocab_size, dtype=np.int64)
    stamp = 0
    for n in range(valid.shape[0]):
        for t in range(valid.shape[1]):
            if not valid[n, t]:
                continue
            stamp += 1
            total = np.float64(tail[n, t])
            sound = tail[n, t] >= 0
            for e in range(offsets[n, t], offsets[n, t + 1]):
                token = ids[e]
                if token < 0 or token >= vocab_size:
                    return n, t
                sound &= seen[token] != stamp and probs[e] >= 0
                seen[token] = stamp
                total += probs[e]
            if offsets[n, t + 1] - offsets[n, t] == vocab_size:
                sound &= tail[n, t] <= SLACK  # nothing is left that it could be the probability of
            if not (sound and abs(total - 1.0) <= SLACK):
                return n, t
    return -1, -1


@compiled
def label_probs(rows: Any, labels: Ints) -> Floats:
    """[N, T] probability of the label, the whole tail where it is not listed (the most it can have meant), ≥ FLOOR.

    1 where the teacher is not valid: nothing to lose.
    """
    offsets, ids, probs, tail, valid = rows
    out = np.ones(valid.shape)
    for n in range(valid.shape[0]):
        for t in range(valid.shape[1]):
            if valid[n, t]:
                prob = tail[n, t]
                for e in range(offsets[n, t], offsets[n, t + 1]):
                    if ids[e] == labels[t]:
                        prob = probs[e]
                        break
                out[n, t] = max(np.float64(prob), FLOOR)
    return out


@compiled
def entropies(rows: Any, logs: Floats) -> Floats:
    """[N, T] nats of each row, its listed entries and the tail as one bucket; 0 where the teacher is not valid.

    logs [nnz] are those of probs, taken beforehand: numpy's are vectorised.
    """
    offsets, _, probs, tail, valid = rows
    out = np.zeros(valid.shape)
    for n in range(valid.shape[0]):
        for t in range(valid.shape[1]):
            if valid[n, t]:
                nats = 0.0
                for e in range(offsets[n, t], offsets[n, t + 1]):
                    if probs[e] > 0:
                        nats -= probs[e] * logs[e]
                if tail[n, t] > 0:
                    nats -= tail[n, t] * np.log(np.float64(tail[n, t]))
                out[n, t] = nats
    return out


@compiled
def _select(keys: Any, size: int, top_k: int) -> None:
    """Move the `top_k` largest of keys[:size] to the front, in any order (quickselect; keys are distinct)."""
    low, high = 0, size - 1
    while low < high:
        a, b, c = keys[low], keys[(low + high) // 2], keys[high]
        pivot = max(min(a, b), min(max(a, b), c))  # median of three
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
        if top_k - 1 <= j:
            high = j
        elif top_k - 1 >= i:
            low = i
        else:
            return


@compiled
def _write(row: Any, size: int, top_k: int, out: Any, used: int) -> Any:
    """Write the gathered row after entry `used` and clear the scratch. Returns entries used and the mass cut off.

    The cut compares what is written: the bits of a positive float32 order as it does, and the inverted id below them
    puts the lowest id first among equals.
    """
    (scratch, touched, keys, single, bits), (ids, probs) = row, out
    kept, cut = 0, 0.0
    for i in range(size):
        token = touched[i]
        single[0] = scratch[token]
        scratch[token] = 0.0
        keys[kept] = (np.uint64(bits[0]) << np.uint64(32)) | np.uint64(np.uint32(0xFFFFFFFF) - np.uint32(token))
        kept += bits[0] != 0  # what is 0 in float32 is not listed
    if kept > top_k:
        _select(keys, kept, top_k)
    for i in range(kept):
        bits[0] = np.uint32(keys[i] >> np.uint64(32))
        if i < top_k:
            ids[used] = np.uint32(0xFFFFFFFF) - np.uint32(keys[i] & np.uint64(0xFFFFFFFF))
            probs[used] = single[0]
            used += 1
        else:
            cut += single[0]
    return used, cut


@compiled
def _new_row(num_entries: int, vocab_size: int) -> Any:
    """Scratch [V], touched tokens, sort keys, and one float32 with its bits."""
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
    """Offsets [T + 1], room for all ids and probs, tail [T]; and the most entries that a position has to gather."""
    num_t = offsets.shape[1] - 1
    room, most = 0, 0
    for t in range(num_t):
        entries = (offsets[:, t + 1] - offsets[:, t]).sum()
        room += min(entries, top_k)
        most = max(most, entries)
    ids, probs = np.empty(room, dtype=np.int32), np.empty(room, dtype=np.float32)
    return np.zeros(num_t + 1, dtype=np.int64), ids, probs, np.zeros(num_t, dtype=np.float32), most


@compiled
def _gather_mean(rows: Any, weights: Floats, t: int, scratch: Floats, touched: Any) -> Any:
    """Add up one position's rows by weight. Returns the number of tokens touched and the tail."""
    offsets, ids, probs, tail, _ = rows
    size, rest = 0, 0.0
    for n in range(weights.shape[0]):
        weight = weights[n, t]
        if weight > 0:
            rest += weight * tail[n, t]
            for e in range(offsets[n, t], offsets[n, t + 1]):
                share = weight * probs[e]
                if share > 0:
                    token = ids[e]
                    touched[size] = token
                    size += scratch[token] == 0.0
                    scratch[token] += share
    return size, rest


@compiled
def mean_rows(rows: Any, weights: Floats, top_k: int, vocab_size: int) -> Any:
    """Σ w·p of every position, the tail with it: offsets [T + 1], ids, probs, tail [T].

    weights [N, T] sum to 1, or to 0 where the result is not valid.
    """
    offsets, ids, probs, tail, most = _new_out(rows[0], top_k)
    row = _new_row(most, vocab_size)
    used = 0
    for t in range(len(tail)):
        size, rest = _gather_mean(rows, weights, t, row[0], row[1])
        used, cut = _write(row, size, top_k, (ids, probs), used)
        offsets[t + 1], tail[t] = used, rest + cut
    return offsets, ids[:used].copy(), probs[:used].copy(), tail


@compiled
def _gather_logs(rows: Any, logs: Floats, weights: Floats, t: int, log_row: Any) -> Any:
    """Gather Σ w·(log p − log u) per listed id, u being what each teacher leaves to an id that it does not list.

    Returns the number of ids touched, Σ w·log u, and how many teachers leave nothing (their log u counts as 0 and they
    as STRICT in an id's listers).
    """
    offsets, ids, _, tail, _ = rows
    scratch, touched, listers = log_row
    size, base, num_strict = 0, 0.0, 0
    for n in range(weights.shape[0]):
        weight = weights[n, t]
        if weight > 0:
            unlisted = len(scratch) - (offsets[n, t + 1] - offsets[n, t])
            spread = unlisted > 0 and tail[n, t] > 0
            log_u = np.log(tail[n, t] / np.float64(unlisted)) if spread else 0.0
            base += weight * log_u
            num_strict += not spread
            for e in range(offsets[n, t], offsets[n, t + 1]):
                token = ids[e]
                touched[size] = token
                size += listers[token] == 0
                listers[token] += 1 if spread else STRICT + 1
                scratch[token] += weight * (logs[e] - log_u)
    return size, base, num_strict


@compiled
def _normalise_logs(log_row: Any, size: int, base: float, num_strict: int) -> Any:
    """Turn the gathered logs into probabilities, in place, and forget the listers.

    Returns the probability of everything that nobody lists, and False if nothing at all is left at this position.
    """
    scratch, touched, listers = log_row
    unlisted = len(scratch) - size
    best = base if num_strict == 0 and unlisted > 0 else -np.inf
    for i in range(size):
        token = touched[i]
        if listers[token] // STRICT == num_strict:
            scratch[token] += base
            best = max(best, scratch[token])
        else:
            scratch[token] = -np.inf
        listers[token] = 0
    alive = best > -np.inf
    rest = unlisted * np.exp(base - best) if alive and num_strict == 0 else 0.0
    total = rest
    for i in range(size):
        token = touched[i]
        scratch[token] = np.exp(scratch[token] - best) if alive else 0.0
        total += scratch[token]
    if alive:
        for i in range(size):
            scratch[touched[i]] /= total
        rest /= total
    return rest, alive


@compiled
def geometric_rows(rows: Any, logs: Floats, weights: Floats, top_k: int, vocab_size: int) -> Any:
    """Π p^w of every position, normalised over the vocabulary: as mean_rows, and the number of positions without any.

    There no token is possible for all teachers, and the arithmetic mean stands in. logs [nnz] are those of probs.
    """
    offsets, ids, probs, tail, most = _new_out(rows[0], top_k)
    row = _new_row(most, vocab_size)
    log_row = (row[0], row[1], np.zeros(vocab_size, dtype=np.int32))
    used, num_vanished = 0, 0
    for t in range(len(tail)):
        if weights[:, t].sum() > 0:
            size, base, num_strict = _gather_logs(rows, logs, weights, t, log_row)
            rest, alive = _normalise_logs(log_row, size, base, num_strict)
            if not alive:
                num_vanished += 1
                size, rest = _gather_mean(rows, weights, t, row[0], row[1])
            used, cut = _write(row, size, top_k, (ids, probs), used)
            tail[t] = rest + cut
        offsets[t + 1] = used
    return offsets, ids[:used].copy(), probs[:used].copy(), tail, num_vanished
