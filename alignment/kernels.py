"""Compiled loops of byte-chain alignment over the branches of one block. `byte_chain` defines the terms.

Notation, as in `byte_chain`: a block has teacher tokens t_1 … t_p and student tokens u_1 … u_q. Candidate x of teacher
row m is the branch t_1 … t_(m−1)·x with probability P(t_1) … P(t_(m−1)) · P_m(x).

A branch is stored as a probability and four integers: it consists of the first SHARED student tokens of the block's
text, followed by LENGTH tokens from index BEGIN of one of three pools:

    TABLE    tokens of the translation table (`Translation.tokens`)
    WRITTEN  tokens that the student's tokenizer wrote for the branch
    SINGLE   one token, namely the number BEGIN itself

A row is accumulated in `scratch`, a dense array over the student's vocabulary that is all zero between rows; `touched`
lists the tokens with an entry. To add to a token is then one addition, and only touched entries are cleared.

Sizes: S rows, K candidates, T_t teacher tokens, T student tokens, B blocks, W teacher vocabulary.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignment.offsets import INSIDE
from alignment.trie import NOTHING, longest_token
from kernel_cache.compiled import compiled

NONE = -1  # no student token, no continuation
SHARED, POOL, BEGIN, LENGTH = range(4)  # columns of a branch
TABLE, WRITTEN, SINGLE = range(3)  # pools

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@compiled
def text_probs_before(actual: Floats, first_row: int, cuts: Ints) -> Floats:
    """[S] Return the probability of the block's text before each row: P(t_1) … P(t_(m−1)), 1 at a block's first row.

    Tokens before the first row have no probability and count as certain.
    """
    out = np.ones(len(actual))
    for b in range(len(cuts) - 1):
        prob = 1.0  # invariant: product over the tokens of block b before t
        for t in range(max(cuts[b], first_row), cuts[b + 1]):
            out[t - first_row] = prob
            prob *= actual[t - first_row]
    return out


@compiled
def student_tokens_before(cuts_teacher: Ints, cuts_student: Ints, ends_teacher: Ints, ends_student: Ints) -> Any:
    """Compare the student tokens of a block with the text before each of the block's teacher tokens.

    Returns two arrays [T_t]: the number of student tokens that lie completely in that text, and whether the last of
    them ends exactly where the text ends. Both are 0 / False for the first teacher token of a block.
    """
    count = np.zeros(len(ends_teacher), dtype=np.int64)
    flush = np.zeros(len(ends_teacher), dtype=np.bool_)
    for b in range(len(cuts_teacher) - 1):
        s, stop = cuts_student[b], cuts_student[b + 1]
        for t in range(cuts_teacher[b] + 1, cuts_teacher[b + 1]):
            # Invariant: the student tokens before s end, at a known byte, at or before the end of token t − 1.
            before = ends_teacher[t - 1]
            n = s
            while before != INSIDE and n < stop and ends_student[n] <= before:
                n += 1
                if ends_student[n - 1] != INSIDE:  # tokens that end inside a character count once that end is known
                    s = n
            count[t] = s - cuts_student[b]
            flush[t] = before != INSIDE and count[t] > 0 and ends_student[s - 1] == before
    return count, flush


@compiled
def add_to_row(scratch: Floats, touched: NDArray[np.int32], size: int, token: int, prob: float) -> Any:
    """Add a probability to one token of the row; return the number of touched tokens.

    The arguments are single arrays and not a tuple: unpacking a tuple for every candidate took three quarters of the
    time.
    """
    if prob > 0.0:
        if scratch[token] == 0.0:
            touched[size] = token
            size += 1
        scratch[token] += prob
    return size


@compiled
def list_branches(
    branches: Any, at: Any, candidates: Any, block: Any, texts: Any, table: Any, later: Any, trie: Any
) -> Any:
    """List all branches of a block of several tokens from index `at` on, the text itself last; return their number.

    Arguments as in `chain_rows`. `block` holds its teacher tokens t0 … t1 − 1, its student tokens s0 … s1 − 1 and the
    byte offset at which it begins.
    """
    ids, probs, actual, prob_before = candidates
    prob, where = branches
    t0, t1, s0, s1, byte = block
    teacher_ids, student_ids, first_row, count, flush, ends_student, starts_teacher, data = texts
    keys, nodes, token, pieces, piece_at = trie
    offsets, slots, continuation, written = table[0], later[0], later[1], later[2]
    n, text = at, 1.0
    # Invariants: the branches of the rows before t are listed at indices below n; text is their P(t_1) … P(t_(m−1)).
    for t in range(max(t0, first_row), t1):
        j = t - first_row
        slot = slots[j]
        known, end = s0 + count[t], starts_teacher[t]  # first student token not completely before t; where x begins
        begin = byte if count[t] == 0 else ends_student[known - 1]
        # The bytes between the last known student token and the candidate cannot be determined.
        unknown = t > t0 and not flush[t] and (begin == INSIDE or end == INSIDE)
        for k in range(ids.shape[1]):
            x = np.int64(ids[j, k])
            if x == teacher_ids[t]:
                continue  # the candidate is the text, which is listed once, at the end
            prob[n] = prob_before[j] * probs[j, k]
            exact = continuation[slot, k] if slot != NONE else NONE
            if exact != NONE:  # the student's tokenizer wrote this branch from the beginning of the block
                where[n, SHARED], where[n, POOL] = 0, WRITTEN
                where[n, BEGIN], where[n, LENGTH] = written[exact], written[exact + 1] - written[exact]
            elif t == t0 or flush[t]:  # x begins where a student token begins: its translation follows the text
                where[n, SHARED], where[n, POOL] = count[t], TABLE
                where[n, BEGIN], where[n, LENGTH] = offsets[x], offsets[x + 1] - offsets[x]
            elif unknown:  # the branch ends after the known tokens, its probability goes to the tail there
                where[n, SHARED], where[n, POOL], where[n, BEGIN], where[n, LENGTH] = count[t], TABLE, 0, 0
            else:  # x begins inside a student token: find where the branch differs from the text
                same, found = _first_difference(
                    keys, nodes, token, data, begin, end, pieces, piece_at[x], piece_at[x + 1], student_ids, known, s1
                )
                where[n, SHARED], where[n, POOL], where[n, BEGIN] = same - s0, SINGLE, found
                where[n, LENGTH] = 1 if found != NOTHING else 0
            n += 1
        text *= actual[j]
    prob[n] = text
    where[n, SHARED], where[n, POOL], where[n, BEGIN], where[n, LENGTH] = s1 - s0, TABLE, 0, 0
    return n + 1


@compiled
def _first_difference(
    keys: Any, nodes: Any, token: Any, data: Any, begin: int, end: int,
    pieces: Any, start: int, stop: int, student_ids: Any, known: int, s1: int,
) -> Any:  # fmt: skip
    """Find the first token of a branch that differs from the text, with longest tokens instead of the tokenizer.

    The remaining bytes of the branch are data[begin:end] (text from student token `known` to the candidate) followed by
    pieces[start:stop] (the candidate). Returns the student position and the token there; NOTHING if the branch ends
    before it differs or if no token matches.
    """
    while end - begin + stop - start > 0:
        # Invariant: the branch equals the text up to student token `known`, and these bytes remain.
        found, length = longest_token(keys, nodes, token, data, begin, end, pieces, start, stop)
        if found == NOTHING or known >= s1 or found != student_ids[known]:
            return known, found
        known += 1
        start += max(0, length - (end - begin))  # the token used up the text and began to use the candidate
        begin = min(begin + length, end)
    return known, NOTHING


@compiled
def advance(row: Any, branches: Any, alive: int, at: Any, pools: Any) -> Any:
    """Compute the row of one student position and drop the branches that do not continue with the text's token.

    The first `alive` branches begin with u_1 … u_r. Their probabilities sum to Z_r, and each adds its probability / Z_r
    to its token r + 1. A branch without such a token ends here; its share is missing in the row and becomes tail.
    `at` is (r, text token u_(r+1), Z_0). Z_0 is 1 plus the carried probability: before the block's first token nothing
    has been read, and what the teacher did not list belongs to the tail.

    Returns the numbers of touched tokens and of kept branches.
    """
    (scratch, touched), (prob, where) = row, branches
    r, text_token, reached = at
    if r > 0:
        reached = prob[:alive].sum()
    if reached == 0.0:  # all probabilities underflowed
        return 0, 0
    size, kept = 0, 0
    for i in range(alive):  # invariant: the branches 0 … kept − 1 are those of 0 … i − 1 that begin with u_1 … u_(r+1)
        shared, pool, begin, length = where[i]
        if shared + length <= r:
            continue
        token = text_token
        if r >= shared:
            token = begin if pool == SINGLE else np.int64(pools[pool][begin + r - shared])
        size = add_to_row(scratch, touched, size, token, prob[i] / reached)
        if token == text_token:
            prob[kept], where[kept] = prob[i], where[i]
            kept += 1
    return size, kept


@compiled
def carry(carried: Any, branches: Any, alive: int, num_read: int, least: float) -> Any:
    """Copy the branches that continue beyond the end of a block, with probabilities relative to the text's.

    `num_read` is the number of the block's student tokens. Branches with less than `least` of the text's probability
    are dropped. Returns the number of carried branches.
    """
    (to_prob, to_where), (prob, where) = carried, branches
    text = prob[alive - 1] if alive > 0 else 0.0  # the text is listed last and never dropped
    n = 0
    for i in range(alive - 1):
        shared, pool, begin, length = where[i]
        if shared + length > num_read and text > 0.0 and prob[i] >= least * text:
            used = max(num_read - shared, 0)  # tokens of the pool that lie in this block
            to_prob[n] = prob[i] / text
            to_where[n] = (max(shared - num_read, 0), pool, begin + (0 if pool == SINGLE else used), length - used)
            n += 1
    return n
