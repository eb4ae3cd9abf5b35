"""Byte-chain alignment: the chain rule over everything a teacher said, in tokens of the student.

Where both tokenizations of a text cut its bytes is a common boundary; between two neighbours lies a block,
teacher tokens t_1…t_p and student tokens u_1…u_q with the same bytes. At each of its rows m the teacher lists
candidates x: each is a branch, the bytes t_1…t_(m−1)·x, with probability P(t_1)…P(t_(m−1))·P_m(x); the text
itself is one more, with P(t_1)…P(t_p). Written in student tokens, the branches that begin with u_1…u_r say what
follows there: each adds its share to its next token, and one that ends there adds to the tail.

A block's end does not end a branch: one that the student has read so far and that goes on is carried into the next
block, with its probability relative to the text's, and the sum there is 1 plus what was carried. Without that the next
row would deny what the teacher had in mind with a longer token, and the target would know how the text went on.

Exact: branches of a block's first row, and those of later rows of at least EXACT_ABOVE, which the student's own
tokenizer writes. Approximate, with the cost of each on a toy world and on real text in docs/alignment.md: less probable
branches of later rows are read by the student's longest tokens; branches below CARRY_ABOVE of the text are not carried;
a branch follows one candidate beyond the text, so one that ends inside a student token stands for the student's
tokenization of it alone; and what the student would have written together with its last token is not moved back to it.

Masked: a tokenizer whose normalizer changes the text (lower case, dropped blanks) says nothing of some bytes. Positions
there are invalid and counted as such. A space that a tokenizer puts in front of a text is taken off a teacher's
candidates and put before a student's branches. Values are float32: a block less likely than e^−87 is lost.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from alignment import kernels
from alignment.spans import INSIDE, AlignmentError, Cuts, Tokens, common_cuts
from alignment.target import Target
from alignment.translation import Translation

EXACT_ABOVE = 1e-2
CARRY_ABOVE = 1e-3


class Rows(Protocol):
    """A teacher's answer for S consecutive tokens of a text, first row = the token it starts at."""

    @property
    def ids(self) -> NDArray[np.integer]: ...  # [S, K] token ids
    @property
    def logprobs(self) -> NDArray[np.floating]: ...  # [S, K] nats
    @property
    def actual(self) -> NDArray[np.floating]: ...  # [S] nats, of the token that stands there


@dataclass(frozen=True, eq=False)
class Chained:
    """An alignment and where it can be held against the teacher.

    target   what `align` returns
    cuts     all common boundaries
    carried  [B] probability of what is carried into each block, relative to the text's
    """

    target: Target
    cuts: Cuts
    carried: NDArray[np.float64]

    @property
    def blocks(self) -> Cuts:
        """The cuts that nothing was carried across: between two of them target and teacher speak of the same bytes."""
        whole = np.append(self.carried == 0, True)
        return Cuts(*(side[whole] for side in self.cuts))


def align(
    rows: Rows, first_row: int, teacher: Tokens, student: Tokens, translation: Translation, **bounds: float
) -> Target:
    """Turn a teacher's rows into a target over the student's vocabulary, one row per student token.

    rows         answers for teacher tokens first_row … T_teacher − 1
    first_row    0 where the teacher saw a BOS; 1 where nothing stood before its first token
    bounds       exact_above: branches of later rows at least this probable are tokenized by the student, 0: all;
                 carry_above: branches at least this probable, against the text, are carried over the end of a block
    A student position is valid if it begins where the teacher has spoken: at or after the first byte of
    teacher token `first_row`.

    Raises AlignmentError if the rows are not those of these tokens or the texts differ. Inputs are not changed.
    """
    return chained(rows, first_row, teacher, student, translation, **bounds).target


def chained(
    rows: Rows,
    first_row: int,
    teacher: Tokens,
    student: Tokens,
    translation: Translation,
    *,
    exact_above: float = EXACT_ABOVE,
    carry_above: float = CARRY_ABOVE,
) -> Chained:
    """`align`, and what it carried over which cuts."""
    check_rows(rows, first_row, teacher)
    if rows.ids.size and int(rows.ids.max()) >= len(translation.pieces):
        raise AlignmentError(f"row id {int(rows.ids.max())} is outside the teacher's {len(translation.pieces)} ids")
    cuts = cuts_between(teacher, student, translation)
    if translation.is_identity:  # every row speaks of its own token, whatever a normalizer did to the text
        teacher, student = replace(teacher, placing=None), replace(student, placing=None)
    valid = _valid_positions(cuts, first_row, teacher, student)
    if teacher.placing is not None:
        valid &= ~_unspoken(cuts, teacher, translation.pieces)
    ids = np.ascontiguousarray(rows.ids, dtype=np.uint32)
    probs = np.exp(rows.logprobs, dtype=np.float32)
    actual = np.exp(rows.actual, dtype=np.float64)
    reach = kernels.reach(actual, first_row, cuts.teacher)
    rewritten, spaced = _rewritten_rows(cuts, first_row, teacher, student)
    wanted = (reach[rewritten, None] * probs[rewritten] >= exact_above) | spaced[:, None]
    wanted &= ids[rewritten] != teacher.ids[rewritten + first_row, None]
    slots = np.full(len(actual), kernels.NONE, dtype=np.int64)
    slots[rewritten] = np.arange(len(rewritten))
    settled = kernels.settled(*cuts[:2], teacher.ends, student.ends)
    text = np.frombuffer(teacher.text, dtype=np.uint8)
    offsets, out_ids, out_probs, tail, carried = kernels.chain_rows(
        (ids, probs, actual, reach),
        (teacher.ids, student.ids, first_row, *settled, student.ends, teacher.starts, text),
        tuple(cuts),
        (translation.offsets, translation.tokens, translation.first),
        (slots, *_continuations(ids, wanted, rewritten, (teacher, student, cuts), translation)),
        (*translation.student.trie, *translation.flat),
        valid,
        (len(translation.student), carry_above),
    )
    return Chained(Target(offsets, out_ids, out_probs, tail, valid), cuts, carried)


def check_rows(rows: Rows, first_row: int, teacher: Tokens) -> None:
    """Raise AlignmentError if there is not one row for each token from `first_row` on."""
    if len(rows.actual) != len(teacher) - first_row:
        raise AlignmentError(
            f"expected {len(teacher) - first_row} rows ({len(teacher)} teacher tokens from {first_row}), "
            f"received {len(rows.actual)}"
        )


def cuts_between(teacher: Tokens, student: Tokens, translation: Translation) -> Cuts:
    """The common boundaries; every token is a block of its own where both speak the same language."""
    if translation.is_identity and np.array_equal(teacher.ids, student.ids):
        every = np.arange(len(teacher) + 1)
        return Cuts(every, every, np.concatenate([[0], teacher.ends]))
    return common_cuts(teacher, student)


def _valid_positions(cuts: Cuts, first_row: int, teacher: Tokens, student: Tokens) -> NDArray[np.bool_]:
    """Positions at or after the first byte that a row speaks of, of bytes that the teacher has tokens for."""
    valid = np.zeros(len(student), dtype=bool)
    block = int(np.searchsorted(cuts.teacher, first_row))  # first cut at or after the first row
    valid[cuts.student[block] :] = True
    if cuts.teacher[block] != first_row and block > 0:  # the rows begin inside a block
        spoken_from = teacher.ends[first_row - 1]
        inside = np.arange(cuts.student[block - 1] + 1, cuts.student[block])
        valid[inside] = (student.ends[inside - 1] >= spoken_from) & (spoken_from > 0)
    return valid


def _unspoken(cuts: Cuts, teacher: Tokens, pieces: tuple[bytes | None, ...]) -> NDArray[np.bool_]:
    """Positions of which a teacher whose normalizer changed the text says nothing.

    They are those of a block of which some bytes are in none of its tokens, or in the unknown token, which would give
    its probability to whatever stands there; and, where its tokens do not write the text's bytes, all but the first: no
    other of its branches begins with what the student has read there, so they would merely repeat the text.
    """
    changed = np.concatenate([[0], np.cumsum(~teacher.written)])[cuts.teacher]
    per_block = np.diff(cuts.student)
    later = np.ones(cuts.student[-1], dtype=bool)
    later[cuts.student[:-1][per_block > 0]] = False
    unknown = np.array([pieces[i] is None for i in teacher.ids.tolist()], dtype=bool)
    unknown &= teacher.ends <= teacher.num_bytes  # a closing EOS is known
    silent = np.concatenate([[0], np.cumsum(unknown)])[cuts.teacher]
    return np.repeat(gaps(cuts, teacher) | (np.diff(silent) > 0), per_block) | (
        later & np.repeat(np.diff(changed) > 0, per_block)
    )


def gaps(cuts: Cuts, teacher: Tokens) -> NDArray[np.bool_]:
    """[B] whether some bytes of a block lie in no teacher token."""
    of_token = np.repeat(np.arange(len(cuts.at) - 1), np.diff(cuts.teacher))
    before = np.maximum(np.concatenate([[0], teacher.ends[:-1]])[: len(teacher)], cuts.at[of_token])
    gaps = np.bincount(
        of_token, weights=(teacher.starts > before) & (teacher.starts != INSIDE), minlength=len(cuts.at) - 1
    )
    reached = cuts.at[:-1].copy()  # the last known end in each block
    np.maximum.at(reached, of_token, teacher.ends)
    return (gaps > 0) | (reached < cuts.at[1:])


def _rewritten_rows(
    cuts: Cuts, first_row: int, teacher: Tokens, student: Tokens
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """[R] rows whose candidates do not continue the text as the table has them, and [R] those of them where it is for
    a space: rows that do not begin a block, and rows where a tokenizer puts a space of its own.
    """
    begins = np.zeros(len(teacher), dtype=bool)
    begins[cuts.teacher[:-1][np.diff(cuts.teacher) > 0]] = True
    spaced = teacher.own_space.copy()
    if student.placing is not None:
        filled = np.diff(cuts.student) > 0
        own = np.zeros(len(filled), dtype=bool)
        own[filled] = student.own_space[cuts.student[:-1][filled]]
        spaced |= np.repeat(own, np.diff(cuts.teacher))
    rows = np.flatnonzero((~begins | spaced)[first_row:])
    return rows, spaced[rows + first_row]


def _continuations(
    ids: NDArray[np.uint32],
    wanted: NDArray[np.bool_],
    rewritten: NDArray[np.int64],
    text: tuple[Tokens, Tokens, Cuts],
    translation: Translation,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    """The wanted branches, written by the student: [R, K] index (NONE: not wanted), offsets, tokens."""
    (teacher, student, cuts), token_bytes = text, translation.pieces
    tokens = rewritten + len(teacher) - len(ids)
    blocks = np.searchsorted(cuts.teacher, tokens, side="right") - 1
    before = [
        _written(teacher, translation, begin, end)
        for begin, end in zip(cuts.teacher[blocks].tolist(), tokens.tolist(), strict=True)
    ]
    if student.placing is not None and len(student):
        own = student.own_space[np.minimum(cuts.student[blocks], len(student) - 1)]
        before = [b" " + data if space else data for data, space in zip(before, own.tolist(), strict=True)]
    row, k = np.nonzero(wanted)
    candidates = ids[rewritten[row], k].tolist()
    # a special token has no bytes: its branch ends where it would stand
    pieces = [token_bytes[x] or b"" for x in candidates]
    if teacher.placing is not None:
        own = teacher.own_space[tokens[row]]
        pieces = [p.removeprefix(b" ") if space else p for p, space in zip(pieces, own.tolist(), strict=True)]
    index = np.full(wanted.shape, kernels.NONE, dtype=np.int64)
    index[row, k] = np.arange(len(pieces))
    return index, *translation.write([before[r] + p for r, p in zip(row.tolist(), pieces, strict=True)])


def _written(teacher: Tokens, translation: Translation, begin: int, end: int) -> bytes:
    """What the teacher's tokens from `begin` to `end` write of the text."""
    pieces = [translation.pieces[i] or b"" for i in teacher.ids[begin:end].tolist()]
    if teacher.placing is not None:
        own = teacher.own_space[begin:end].tolist()
        pieces = [p.removeprefix(b" ") if space else p for p, space in zip(pieces, own, strict=True)]
    return b"".join(pieces)
