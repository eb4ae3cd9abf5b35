"""The compiled main loop of byte-chain alignment: the target rows of all student positions, block by block.

`kernels` has the loops over the branches of one block and the storage format of a branch.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignment.kernels import NONE, TABLE, add_to_row, advance, carry, list_branches
from kernel_cache.compiled import compiled


@compiled
def chain_rows(
    candidates: Any,  # [S, K] uint32 ids, [S, K] float32 and [S] float64 probabilities, [S] `text_probs_before`
    texts: Any,  # ids [T_t] and [T], first_row, `student_tokens_before`, student ends [T], teacher starts [T_t], bytes
    cuts: Any,  # teacher and student token indices and byte offsets of the common boundaries [B + 1]
    table: Any,  # of the translation: offsets [W + 1], tokens, first [W]
    later: Any,  # branches written by the student's tokenizer: slot [S], index [R, K] or NONE, offsets, tokens
    trie: Any,  # of the student's tokens: keys, nodes, token; bytes of the teacher's tokens: data, offsets
    valid: NDArray[np.bool_],
    limits: Any,  # size of the student's vocabulary; least probability, relative to the text, of a carried branch
) -> Any:
    """Return the rows of all student positions: offsets [T + 1], ids, probs, tail [T]; and [B] the carried probability.

    The carried probability of a block is the sum over the branches that continue into it, relative to the text.
    """
    teacher_ids, student_ids, first_row = texts[:3]
    cuts_teacher, cuts_student, cuts_at = cuts
    vocab_size, least = limits
    num_k = candidates[0].shape[1]
    # A block lists at most its rows · K branches and the text; as many carried ones are kept.
    most = np.diff(cuts_teacher).max() * num_k + 1 if len(cuts_teacher) > 1 else 1
    row = (np.zeros(vocab_size), np.empty(2 * most, dtype=np.int32))
    branches = (np.empty(2 * most), np.empty((2 * most, 4), dtype=np.int64))
    carried = (np.empty(2 * most), np.empty((2 * most, 4), dtype=np.int64))
    offsets, tail = np.zeros(len(student_ids) + 1, dtype=np.int64), np.zeros(len(student_ids), dtype=np.float32)
    ids, probs = _grown(np.empty(0, dtype=np.int32), np.empty(0, dtype=np.float32), len(student_ids) * (num_k + 1) // 2)
    carried_prob = np.zeros(len(cuts_teacher) - 1)
    used, num_carried = 0, 0
    # Invariants: the rows of all student tokens before s0 are written to the first `used` entries; the first
    # `num_carried` branches of `carried` continue from the previous block into block b.
    for b in range(len(cuts_teacher) - 1):
        t0, t1, s0, s1 = cuts_teacher[b], cuts_teacher[b + 1], cuts_student[b], cuts_student[b + 1]
        single = t1 - t0 == 1 and s1 - s0 == 1 and t0 >= first_row and later[0][t0 - first_row] == NONE
        num_carried = min(num_carried, most)  # bounds the memory; real texts stay far below
        simple = single and num_carried == 0  # one teacher token, one student token, no other branches: a table lookup
        alive, reached = 0, 1.0
        if not simple:
            for i in range(num_carried):
                branches[0][i], branches[1][i] = carried[0][i], carried[1][i]
                reached += carried[0][i]
            block = (t0, t1, s0, s1, cuts_at[b])
            carried_prob[b] = reached - 1.0
            alive = list_branches(branches, num_carried, candidates, block, texts, table, later, trie)
        for s in range(s0, s1):  # invariant: the first `alive` branches begin with the student tokens s0 … s − 1
            if simple:
                size = _single_row(row, candidates, t0 - first_row, (teacher_ids[t0], student_ids[s]), table[2])
            else:
                size, alive = advance(row, branches, alive, (s - s0, student_ids[s], reached), (table[1], later[3]))
            ids, probs = _grown(ids, probs, used + size)
            mass = _write_row(row, size, (ids, probs), used)
            if valid[s]:  # an invalid row is overwritten by the next one
                used += size
                tail[s] = max(1.0 - mass, 0.0)
            offsets[s + 1] = used
        num_carried = 0
        # Branches continue only from a block whose rows are all known and whose positions are all valid.
        if t1 > t0 and s1 > s0 and t0 >= first_row and valid[s0:s1].all():
            if simple:
                text = (teacher_ids[t0], student_ids[s0], least)
                num_carried = _carry_single(carried, candidates, t0 - first_row, text, table)
            else:
                num_carried = carry(carried, branches, alive, s1 - s0, least)
    return offsets, ids[:used].copy(), probs[:used].copy(), tail, carried_prob


@compiled
def _single_row(row: Any, candidates: Any, j: int, text: Any, first: Any) -> Any:
    """Compute the row of a block of one teacher token and one student token; return the number of touched tokens.

    Every candidate adds its probability to the first student token of its translation; the text's token gets `actual`.
    """
    ids, probs, actual, _ = candidates
    scratch, touched = row
    teacher_token, student_token = text
    size = 0
    for k in range(ids.shape[1]):
        x = np.int64(ids[j, k])
        if x != teacher_token and first[x] != NONE:
            size = add_to_row(scratch, touched, size, first[x], probs[j, k])
    return add_to_row(scratch, touched, size, student_token, actual[j])


@compiled
def _carry_single(carried: Any, candidates: Any, j: int, text: Any, table: Any) -> int:
    """Copy the branches that continue beyond a block of one token each, as `carry` does; return their number.

    They are the candidates whose translation begins with the text's student token and has more tokens.
    """
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
def _grown(ids: Any, probs: Any, needed: int) -> Any:
    """Return the arrays, copied to twice the size needed if they have fewer than `needed` entries."""
    if needed <= len(ids):
        return ids, probs
    wide_ids, wide_probs = np.empty(2 * needed, dtype=np.int32), np.empty(2 * needed, dtype=np.float32)
    wide_ids[: len(ids)], wide_probs[: len(probs)] = ids, probs
    return wide_ids, wide_probs


@compiled
def _write_row(row: Any, size: int, out: Any, used: int) -> float:
    """Write the accumulated row at entry `used`, clear the scratch array, and return the mass of the row.

    Rounding can raise the mass above 1 in the last digits; the row is then scaled to 1.
    """
    (scratch, touched), (ids, probs) = row, out
    mass = 0.0
    for i in range(size):
        mass += scratch[touched[i]]
    excess = max(mass, 1.0)
    for i in range(size):  # invariant: the first i touched entries are written and are zero again
        ids[used + i] = touched[i]
        probs[used + i] = scratch[touched[i]] / excess
        scratch[touched[i]] = 0.0
    return mass
