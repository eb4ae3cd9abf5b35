"""The loops of alignment, compiled by numba: no Python object, no lock, cached on disk after the first call.

chain.py says what is computed and why. A row is gathered in a scratch array over the vocabulary, so that adding to
a token is one addition; the list of touched tokens becomes the row and clears the scratch.

Legend: S rows, K candidates, T_t and T student tokens of the teacher and the student, B blocks, W teacher vocabulary.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignment.compiled import compiled
from alignment.spans import INSIDE
from alignment.trie import NOTHING, longest

NONE = -1  # no student token, no continuation
SHARED, POOL, BEGIN, LENGTH = range(4)  # columns of a branch: see _gather
TABLE, WRITTEN, ONE = range(3)  # pools of a branch's tokens: ONE is a single token, BEGIN itself

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


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
def _crossing(carried: Any, candidates: Any, j: int, text: Any, table: Any) -> int:
    """Of a block of one and one, the candidates that go on where the student has read its token: how many."""
    ids, probs, actual, _ = candidates
    prob, where = carried
    teacher_token, student_token, least = text
    offsets, _, first = table
    n = 0
    for k in range(ids.shape[1] if actual[j] > 0.0 else 0):
        x = np.int64(ids[j, k])
        if first[x] != student_token or x == teacher_token or probs[j, k] < least * actual[j]:
            continue
        if offsets[x + 1] - offsets[x] > 1:
            prob[n] = probs[j, k] / actual[j]
            where[n] = (0, TABLE, offsets[x] + 1, offsets[x + 1] - offsets[x] - 1)
            n += 1
    return n


@compiled
def _gather(branches: Any, at: Any, candidates: Any, block: Any, texts: Any, table: Any, later: Any, trie: Any) -> Any:
    """List the branches of a block of several tokens from index `at` on; the text itself is the last.

    A branch is SHARED tokens of the text, then LENGTH tokens from BEGIN of a pool. Returns how many there are.
    """
    ids, probs, actual, weight = candidates
    prob, where = branches
    t0, t1, s0, s1, byte = block
    teacher_ids, student_ids, first_row, count, flush, ends_student, starts_teacher, data = texts
    keys, nodes, token, pieces, piece_at = trie
    offsets, slots, continuation, written = table[0], later[0], later[1], later[2]
    n, text = at, 1.0
    for t in range(max(t0, first_row), t1):
        j = t - first_row
        slot = slots[j]
        known, end = s0 + count[t], starts_teacher[t]
        begin = byte if count[t] == 0 else ends_student[known - 1]
        blind = t > t0 and not flush[t] and (begin == INSIDE or end == INSIDE)
        for k in range(ids.shape[1]):
            x = np.int64(ids[j, k])
            if x == teacher_ids[t]:
                continue
            prob[n] = weight[j] * probs[j, k]
            exact = continuation[slot, k] if slot != NONE else NONE
            if exact != NONE:
                where[n, SHARED], where[n, POOL] = 0, WRITTEN
                where[n, BEGIN], where[n, LENGTH] = written[exact], written[exact + 1] - written[exact]
            elif t == t0 or flush[t]:
                where[n, SHARED], where[n, POOL] = count[t], TABLE
                where[n, BEGIN], where[n, LENGTH] = offsets[x], offsets[x + 1] - offsets[x]
            elif blind:
                where[n, SHARED], where[n, POOL], where[n, BEGIN], where[n, LENGTH] = count[t], TABLE, 0, 0
            else:
                read, found = _leave(
                    keys, nodes, token, data, begin, end, pieces, piece_at[x], piece_at[x + 1], student_ids, known, s1
                )
                where[n, SHARED], where[n, POOL], where[n, BEGIN] = read - s0, ONE, found
                where[n, LENGTH] = 1 if found != NOTHING else 0
            n += 1
        text *= actual[j]
    prob[n] = text
    where[n, SHARED], where[n, POOL], where[n, BEGIN], where[n, LENGTH] = s1 - s0, TABLE, 0, 0
    return n + 1


@compiled
def _leave(
    keys: Any, nodes: Any, token: Any, data: Any, begin: int, end: int,
    pieces: Any, start: int, stop: int, student_ids: Any, known: int, s1: int,
) -> Any:  # fmt: skip
    """Where a branch leaves the text, by the longest tokens instead of the student's tokenizer.

    From student position `known` on it reads data[begin:end], the text up to the candidate, and the candidate, token
    by token for as long as they are the text's. Returns the position and the token that is not; NOTHING at its end.
    """
    while end - begin + stop - start > 0:
        found, length = longest(keys, nodes, token, data, begin, end, pieces, start, stop)
        if found == NOTHING or known >= s1 or found != student_ids[known]:
            return known, found
        known += 1
        start += max(0, length - (end - begin))
        begin = min(begin + length, end)
    return known, NOTHING


@compiled
def _advance(row: Any, branches: Any, alive: int, at: Any, pools: Any) -> Any:
    """Add each branch's share to its next token, and keep those whose next token is the text's.

    Returns tokens touched and branches kept. A branch that ends here adds to nothing: its share is tail.
    """
    (scratch, touched), (prob, where) = row, branches
    r, text_token, reached = at
    if r > 0:
        reached = prob[:alive].sum()
    if reached == 0.0:  # less likely than a float can say
        return 0, 0
    size, kept = 0, 0
    for i in range(alive):
        shared, pool, begin, length = where[i]
        if shared + length <= r:
            continue
        token = text_token
        if r >= shared:
            token = begin if pool == ONE else np.int64(pools[pool][begin + r - shared])
        size = _add(scratch, touched, size, token, prob[i] / reached)
        if token == text_token:
            prob[kept], where[kept] = prob[i], where[i]
            kept += 1
    return size, kept


@compiled
def _carry(carried: Any, branches: Any, alive: int, num_read: int, least: float) -> Any:
    """Of the branches that are alive at the end of a block, those that go on, relative to the text: how many."""
    (to_prob, to_where), (prob, where) = carried, branches
    text = prob[alive - 1] if alive > 0 else 0.0  # listed last, and kept to the end
    n = 0
    for i in range(alive - 1):
        shared, pool, begin, length = where[i]
        if shared + length > num_read and text > 0.0 and prob[i] >= least * text:
            used = max(num_read - shared, 0)
            to_prob[n] = prob[i] / text
            to_where[n] = (max(shared - num_read, 0), pool, begin + (0 if pool == ONE else used), length - used)
            n += 1
    return n


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
    texts: Any,  # ids [T_t] and [T], first_row, `settled`'s two, student ends [T], teacher starts [T_t], the bytes
    cuts: Any,  # teacher and student cuts and bytes [B + 1]
    table: Any,  # of the translation: offsets [W + 1], tokens, first [W]
    later: Any,  # of rows that are written anew: slot [S], continuations [R, K] (NONE: none), offsets, tokens
    trie: Any,  # of the student's tokens: keys, nodes, token; of the teacher's: data, offsets
    valid: NDArray[np.bool_],
    limits: Any,  # the student's vocabulary size; the least share of a branch that is carried over a cut
) -> Any:
    """The rows of all student positions: offsets [T + 1], ids, probs, tail [T]; [B] what is carried into each block."""
    teacher_ids, student_ids, first_row = texts[:3]
    cuts_teacher, cuts_student, cuts_at = cuts
    vocab_size, least = limits
    num_k = candidates[0].shape[1]
    most = np.diff(cuts_teacher).max() * num_k + 1 if len(cuts_teacher) > 1 else 1
    row = (np.zeros(vocab_size), np.empty(2 * most, dtype=np.int32))
    branches = (np.empty(2 * most), np.empty((2 * most, 4), dtype=np.int64))
    carried = (np.empty(2 * most), np.empty((2 * most, 4), dtype=np.int64))
    offsets, tail = np.zeros(len(student_ids) + 1, dtype=np.int64), np.zeros(len(student_ids), dtype=np.float32)
    ids, probs = _room(np.empty(0, dtype=np.int32), np.empty(0, dtype=np.float32), len(student_ids) * (num_k + 1) // 2)
    brought = np.zeros(len(cuts_teacher) - 1)
    used, num_carried = 0, 0
    for b in range(len(cuts_teacher) - 1):
        t0, t1, s0, s1 = cuts_teacher[b], cuts_teacher[b + 1], cuts_student[b], cuts_student[b + 1]
        single = t1 - t0 == 1 and s1 - s0 == 1 and t0 >= first_row and later[0][t0 - first_row] == NONE
        num_carried = min(num_carried, most)  # a bound on memory: no real text has come near it
        simple = single and num_carried == 0
        alive, reached = 0, 1.0
        if not simple:
            for i in range(num_carried):
                branches[0][i], branches[1][i] = carried[0][i], carried[1][i]
                reached += carried[0][i]
            block = (t0, t1, s0, s1, cuts_at[b])
            brought[b] = reached - 1.0
            alive = _gather(branches, num_carried, candidates, block, texts, table, later, trie)
        for s in range(s0, s1):
            if simple:
                size = _single(row, candidates, t0 - first_row, (teacher_ids[t0], student_ids[s]), table[2])
            else:
                size, alive = _advance(row, branches, alive, (s - s0, student_ids[s], reached), (table[1], later[3]))
            ids, probs = _room(ids, probs, used + size)
            mass = _flush(row, size, (ids, probs), used)
            if valid[s]:
                used += size
                tail[s] = max(1.0 - mass, 0.0)
            offsets[s + 1] = used
        num_carried = 0
        if t1 > t0 and s1 > s0 and t0 >= first_row and valid[s0:s1].all():
            if simple:
                text = (teacher_ids[t0], student_ids[s0], least)
                num_carried = _crossing(carried, candidates, t0 - first_row, text, table)
            else:
                num_carried = _carry(carried, branches, alive, s1 - s0, least)
    return offsets, ids[:used].copy(), probs[:used].copy(), tail, brought
