"""The loops of alignment, compiled by numba: no Python object, no lock, cached on disk after the first call.

chain.py says what is computed and why. A row is gathered in a scratch array over the vocabulary, so that adding to
a token is one addition; the list of touched tokens becomes the row and clears the scratch.

Legend: S rows, K candidates, T_t and T student tokens of the teacher and the student, B blocks, W teacher vocabulary.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from alignment.spans import INSIDE

NONE = -1  # no student token, no continuation
SHARED, POOL, BEGIN, LENGTH = range(4)  # columns of a branch: see _gather

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def compiled(function: Callable[..., Any]) -> Any:
    """numba's njit without the lock, cached where a cache can be written."""
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # neither this folder nor the user's cache can be written
        return njit(nogil=True)(function)


@compiled
def reach(actual: Floats, first_row: int, cuts: Ints) -> Floats:
    """[S] probability of the block's text before each row; what stands before the first row is taken as certain."""
    out = np.ones(len(actual))
    for b in range(len(cuts) - 1):
        weight = 1.0
        for t in range(max(cuts[b], first_row), cuts[b + 1]):
            out[t - first_row] = weight
            weight *= actual[t - first_row]
    return out


@compiled
def settled(cuts_teacher: Ints, cuts_student: Ints, ends_teacher: Ints, ends_student: Ints) -> Any:
    """For each teacher token: how many student tokens of its block lie wholly in the text before it [T_t], and
    whether the last of them ends where that text ends [T_t].
    """
    count = np.zeros(len(ends_teacher), dtype=np.int64)
    flush = np.zeros(len(ends_teacher), dtype=np.bool_)
    for b in range(len(cuts_teacher) - 1):
        s, stop = cuts_student[b], cuts_student[b + 1]
        for t in range(cuts_teacher[b] + 1, cuts_teacher[b + 1]):
            before = ends_teacher[t - 1]
            known = s
            while before != INSIDE and known < stop and ends_student[known] <= before:
                known += 1
                if ends_student[known - 1] != INSIDE:
                    s = known
            count[t] = s - cuts_student[b]
            flush[t] = before != INSIDE and count[t] > 0 and ends_student[s - 1] == before
    return count, flush


@compiled
def _add(scratch: Floats, touched: NDArray[np.int32], size: int, token: int, prob: float) -> Any:
    """Add to one token of the row being gathered; returns the number of tokens touched.

    Bare arrays, not a tuple of them: taking a tuple apart for every candidate cost three quarters of the time.
    """
    if prob > 0.0:
        if scratch[token] == 0.0:
            touched[size] = token
            size += 1
        scratch[token] += prob
    return size


@compiled
def _single(row: Any, candidates: Any, j: int, text: Any, first: Any) -> Any:
    """A block of one and one: every candidate but the text's adds to its first student token."""
    ids, probs, actual, _ = candidates
    scratch, touched = row
    teacher_token, student_token = text
    size = 0
    for k in range(ids.shape[1]):
        x = np.int64(ids[j, k])
        if x != teacher_token and first[x] != NONE:
            size = _add(scratch, touched, size, first[x], probs[j, k])
    return _add(scratch, touched, size, student_token, actual[j])


@compiled
def _gather(branches: Any, candidates: Any, block: Any, texts: Any, table: Any, later: Any) -> Any:
    """List the branches of a block of several tokens; the text itself is the last.

    A branch is SHARED tokens of the text, then LENGTH tokens from BEGIN of pool 0 (the table) or 1 (what the
    student's tokenizer wrote). Returns how many there are.
    """
    ids, probs, actual, weight = candidates
    prob, where = branches
    t0, t1, num_student = block
    teacher_ids, first_row, count, flush = texts
    offsets, slots, continuation, written = table[0], later[0], later[1], later[2]
    n, text = 0, 1.0
    for t in range(max(t0, first_row), t1):
        j = t - first_row
        slot = slots[j]
        for k in range(ids.shape[1]):
            x = np.int64(ids[j, k])
            if x == teacher_ids[t]:
                continue
            prob[n] = weight[j] * probs[j, k]
            where[n] = (0, 0, offsets[x], offsets[x + 1] - offsets[x])
            exact = continuation[slot, k] if slot != NONE else NONE
            if exact != NONE:
                where[n] = (0, 1, written[exact], written[exact + 1] - written[exact])
            elif t > t0:
                where[n, SHARED] = count[t]
                if not flush[t]:
                    where[n, LENGTH] = 0
            n += 1
        text *= actual[j]
    prob[n], where[n] = text, (num_student, 0, 0, 0)
    return n + 1


@compiled
def _advance(row: Any, branches: Any, alive: int, at: Any, pools: Any) -> Any:
    """Add each branch's share to its next token, and keep those whose next token is the text's.

    Returns tokens touched and branches kept. A branch that ends here adds to nothing: its share is tail.
    """
    (scratch, touched), (prob, where) = row, branches
    r, text_token = at
    reached = prob[:alive].sum() if r > 0 else 1.0
    size, kept = 0, 0
    for i in range(alive):
        shared, pool, begin, length = where[i]
        if shared + length <= r:
            continue
        token = text_token
        if r >= shared:
            token = np.int64(pools[pool][begin + r - shared])
        size = _add(scratch, touched, size, token, prob[i] / reached)
        if token == text_token:
            prob[kept], where[kept] = prob[i], where[i]
            kept += 1
    return size, kept


@compiled
def _room(ids: Any, probs: Any, needed: int) -> Any:
    """The arrays, longer if they hold fewer than `needed` entries."""
    if needed <= len(ids):
        return ids, probs
    wide_ids, wide_probs = np.empty(2 * needed, dtype=np.int32), np.empty(2 * needed, dtype=np.float32)
    wide_ids[: len(ids)], wide_probs[: len(probs)] = ids, probs
    return wide_ids, wide_probs


@compiled
def _flush(row: Any, size: int, out: Any, used: int) -> float:
    """Write the gathered row after entry `used`, clear the scratch, and return the row's mass."""
    (scratch, touched), (ids, probs) = row, out
    mass = 0.0
    for i in range(size):
        mass += scratch[touched[i]]
    over = max(mass, 1.0)  # by the last digits only: rows arrive with their mass restored
    for i in range(size):
        ids[used + i] = touched[i]
        probs[used + i] = scratch[touched[i]] / over
        scratch[touched[i]] = 0.0
    return mass


@compiled
def chain_rows(
    candidates: Any,  # [S, K] uint32 ids, [S, K] float32 and [S] float64 probabilities, [S] reach
    texts: Any,  # teacher ids [T_t], student ids [T], first_row, and what `settled` returns
    cuts: Any,  # teacher and student cuts [B + 1]
    table: Any,  # of the translation: offsets [W + 1], tokens, first [W]
    later: Any,  # of rows that are written anew: slot [S], continuations [R, K] (NONE: none), offsets, tokens
    valid: NDArray[np.bool_],
    vocab_size: int,
) -> Any:
    """The rows of all student positions: offsets [T + 1], ids, probs, tail [T]."""
    teacher_ids, student_ids, first_row, count, flush = texts
    cuts_teacher, cuts_student = cuts
    num_k = candidates[0].shape[1]
    most = np.diff(cuts_teacher).max() * num_k + 1 if len(cuts_teacher) > 1 else 1
    row = (np.zeros(vocab_size), np.empty(most, dtype=np.int32))
    branches = (np.empty(most), np.empty((most, 4), dtype=np.int64))
    offsets, tail = np.zeros(len(student_ids) + 1, dtype=np.int64), np.zeros(len(student_ids), dtype=np.float32)
    ids, probs = _room(np.empty(0, dtype=np.int32), np.empty(0, dtype=np.float32), len(student_ids) * (num_k + 1) // 2)
    used = 0
    for b in range(len(cuts_teacher) - 1):
        t0, t1, s0, s1 = cuts_teacher[b], cuts_teacher[b + 1], cuts_student[b], cuts_student[b + 1]
        single = t1 - t0 == 1 and s1 - s0 == 1 and t0 >= first_row and later[0][t0 - first_row] == NONE
        alive = 0
        if not single:
            block = (t0, t1, s1 - s0)
            alive = _gather(branches, candidates, block, (teacher_ids, first_row, count, flush), table, later)
        for s in range(s0, s1):
            if single:
                size = _single(row, candidates, t0 - first_row, (teacher_ids[t0], student_ids[s]), table[2])
            else:
                size, alive = _advance(row, branches, alive, (s - s0, student_ids[s]), (table[1], later[3]))
            ids, probs = _room(ids, probs, used + size)
            mass = _flush(row, size, (ids, probs), used)
            if valid[s]:
                used += size
                tail[s] = max(1.0 - mass, 0.0)
            offsets[s + 1] = used
    return offsets, ids[:used].copy(), probs[:used].copy(), tail
