"""Byte-chain alignment: the chain rule over everything a teacher said, in tokens of the student.

Where both tokenizations of a text cut its bytes is a common boundary; between two neighbours lies a block,
teacher tokens t_1…t_p and student tokens u_1…u_q with the same bytes. At each of its rows m the teacher lists
candidates x: each is a branch, the bytes t_1…t_(m−1)·x, with probability P(t_1)…P(t_(m−1))·P_m(x); the text
itself is one more, with P(t_1)…P(t_p). Written in student tokens, the branches that begin with u_1…u_r say what
follows there: each adds its share to its next token, and one that ends there adds to the tail.

Exact: the sum over branches of a block's first row, and over those of later rows whose probability is at least
EXACT_ABOVE; they are written by the student's own tokenizer. Approximate: a less probable branch of a later row is
taken to begin with the text's student tokens that lie wholly before it and to go on with its candidate alone, if the
candidate begins where such a token ends; otherwise what follows is tail. Every branch follows one candidate beyond
the text, so a candidate that ends inside a student token stands for the student's tokenization of it alone.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from alignment import kernels
from alignment.spans import AlignmentError, Cuts, Tokens, common_cuts
from alignment.target import Target
from alignment.translation import Translation

EXACT_ABOVE = 1e-4


class Rows(Protocol):
    """A teacher's answer for S consecutive tokens of a text, first row = the token it starts at."""

    @property
    def ids(self) -> NDArray[np.integer]: ...  # [S, K] token ids
    @property
    def logprobs(self) -> NDArray[np.floating]: ...  # [S, K] nats
    @property
    def actual(self) -> NDArray[np.floating]: ...  # [S] nats, of the token that stands there


def align(
    rows: Rows,
    first_row: int,
    teacher: Tokens,
    student: Tokens,
    translation: Translation,
    *,
    exact_above: float = EXACT_ABOVE,
) -> Target:
    """Turn a teacher's rows into a target over the student's vocabulary, one row per student token.

    rows         answers for teacher tokens first_row … T_teacher − 1
    first_row    0 where the teacher saw a BOS; 1 where nothing stood before its first token
    exact_above  branches at least this probable are tokenized by the student; 0 tokenizes all
    A student position is valid if it begins where the teacher has spoken: at or after the first byte of
    teacher token `first_row`.

    Raises AlignmentError if the rows are not those of these tokens or the texts differ. Inputs are not changed.
    """
    if len(rows.actual) != len(teacher) - first_row:
        raise AlignmentError(
            f"expected {len(teacher) - first_row} rows ({len(teacher)} teacher tokens from {first_row}), "
            f"received {len(rows.actual)}"
        )
    if rows.ids.size and int(rows.ids.max()) >= len(translation.pieces):
        raise AlignmentError(f"row id {int(rows.ids.max())} is outside the teacher's {len(translation.pieces)} ids")
    cuts = cuts_between(teacher, student, translation)
    valid = _valid_positions(cuts, first_row, teacher, student)
    ids = np.ascontiguousarray(rows.ids, dtype=np.uint32)
    probs = np.exp(rows.logprobs, dtype=np.float32)
    actual = np.exp(rows.actual, dtype=np.float64)
    reach = kernels.reach(actual, first_row, cuts.teacher)
    later = _later_rows(cuts, first_row, len(teacher))
    wanted = (reach[later, None] * probs[later] >= exact_above) & (ids[later] != teacher.ids[later + first_row, None])
    offsets, out_ids, out_probs, tail = kernels.chain_rows(
        (ids, probs, actual, reach),
        (teacher.ids, student.ids, first_row, *kernels.settled(*cuts[:2], teacher.ends, student.ends)),
        cuts[:2],
        (translation.offsets, translation.tokens, translation.first),
        _continuations(ids, wanted, (later, first_row), (teacher, cuts), translation),
        valid,
        len(translation.student),
    )
    return Target(offsets, out_ids, out_probs, tail, valid)


def cuts_between(teacher: Tokens, student: Tokens, translation: Translation) -> Cuts:
    """The common boundaries; every token is a block of its own where both speak the same language."""
    if translation.is_identity and np.array_equal(teacher.ids, student.ids):
        every = np.arange(len(teacher) + 1)
        return Cuts(every, every, np.concatenate([[0], teacher.ends]))
    return common_cuts(teacher, student)


def _valid_positions(cuts: Cuts, first_row: int, teacher: Tokens, student: Tokens) -> NDArray[np.bool_]:
    """Positions at or after the first byte that a row speaks of."""
    valid = np.zeros(len(student), dtype=bool)
    block = int(np.searchsorted(cuts.teacher, first_row))  # first cut at or after the first row
    valid[cuts.student[block] :] = True
    if cuts.teacher[block] != first_row and block > 0:  # the rows begin inside a block
        spoken_from = teacher.ends[first_row - 1]
        inside = np.arange(cuts.student[block - 1] + 1, cuts.student[block])
        valid[inside] = (student.ends[inside - 1] >= spoken_from) & (spoken_from > 0)
    return valid


def _later_rows(cuts: Cuts, first_row: int, num_tokens: int) -> NDArray[np.int64]:
    """[R] rows of teacher tokens that do not begin a block."""
    begins = np.zeros(num_tokens, dtype=bool)
    begins[cuts.teacher[:-1]] = True
    return np.flatnonzero(~begins[first_row:])


def _continuations(
    ids: NDArray[np.uint32],
    wanted: NDArray[np.bool_],
    rows: tuple[NDArray[np.int64], int],
    text: tuple[Tokens, Cuts],
    translation: Translation,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    """The wanted branches of later rows, written by the student: [R, K] index (NONE: not wanted), offsets, tokens."""
    (later, first_row), (teacher, cuts) = rows, text
    token_bytes = translation.pieces
    begins = cuts.teacher[np.searchsorted(cuts.teacher, later + first_row) - 1]
    before = [
        b"".join(token_bytes[i] or b"" for i in teacher.ids[begin:end].tolist())
        for begin, end in zip(begins.tolist(), (later + first_row).tolist(), strict=True)
    ]
    row, k = np.nonzero(wanted)
    candidates = ids[later[row], k].tolist()
    # a special token has no bytes: its branch ends where it would stand
    pieces = [before[r] + (token_bytes[x] or b"") for r, x in zip(row.tolist(), candidates, strict=True)]
    index = np.full(wanted.shape, kernels.NONE, dtype=np.int64)
    index[row, k] = np.arange(len(pieces))
    return index, *translation.write(pieces)
