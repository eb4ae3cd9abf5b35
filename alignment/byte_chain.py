"""Byte-chain alignment: convert a teacher's rows to targets over the student's tokens by the chain rule.

Tokenizations of one text share its bytes. An offset at which both the teacher's and the student's tokenization end a
token is a common boundary. A block is the text between two neighbouring common boundaries: the teacher tokens t_1 … t_p
and the student tokens u_1 … u_q with the same bytes.

At row m of a block the teacher lists candidates x. Each candidate is a branch: the bytes of t_1 … t_(m−1)·x, with
probability P(t_1) … P(t_(m−1)) · P_m(x). The text itself is the last branch, with P(t_1) … P(t_p). All branches are
written in student tokens. For student position r = 0 … q − 1, over the branches that begin with u_1 … u_r:

    Z_r = sum of their probabilities; Z_0 = 1
    each branch adds its probability / Z_r to its token r + 1; a branch that ends after r tokens adds to the tail

A branch that begins with all student tokens of its block may continue beyond the block. It is carried into the next
block, with its probability relative to the text's; Z_0 there is 1 plus the carried probability. Without this, the
target would exclude longer tokens of the teacher at the boundary, and so reveal the following text.

The branches of a block's first row are exact. So are the branches of later rows with a probability of at least
EXACT_ABOVE, which the student's tokenizer writes. The rest is approximated (docs/alignment.md measures the effect, for
exact toy models and on real text):

- branches of later rows below EXACT_ABOVE are written with the longest tokens;
- branches below CARRY_ABOVE relative to the text are not carried;
- a branch has one candidate beyond the text: if it ends inside a student token, its own tokenization is used;
- probability is not moved back to a token that the student would have written across the boundary.

A tokenizer whose normalizer changes the text (lower case, dropped blanks) gives no information about some bytes. The
positions there are invalid and are counted. A space that a tokenizer adds in front of a text is removed from the
teacher's candidates and added before the student's branches.

Probabilities in a target are float32: a block with a probability below e^−87 underflows.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from alignment import kernels
from alignment.chain_rows import chain_rows
from alignment.offsets import INSIDE, AlignmentError, Cuts, Tokens, common_cuts, previous_ends
from alignment.target import Target
from alignment.translation import Translation

EXACT_ABOVE = 1e-2
CARRY_ABOVE = 1e-3


class ScoredRows(Protocol):
    """A teacher's scores for S consecutive tokens of a text; row s is the distribution of token s."""

    @property
    def ids(self) -> NDArray[np.integer]: ...  # [S, K] token ids of the candidates
    @property
    def logprobs(self) -> NDArray[np.floating]: ...  # [S, K] nats
    @property
    def actual(self) -> NDArray[np.floating]: ...  # [S] nats, of the token in the text; NaN: a masked row


@dataclass(frozen=True, eq=False)
class ByteChainAlignment:
    """A target, with intermediate results that `tutelage align` shows.

    target   the result of `align`
    cuts     all common boundaries
    carried  [B] probability carried into each block, relative to the text's
    """

    target: Target
    cuts: Cuts
    carried: NDArray[np.float64]

    @property
    def uncrossed_cuts(self) -> Cuts:
        """Common boundaries that no carried branch crosses.

        Between two of them, the likelihoods of the text under target and teacher can be compared.
        """
        uncrossed = np.append(self.carried == 0, True)
        return Cuts(*(side[uncrossed] for side in self.cuts))


def align(
    rows: ScoredRows, first_row: int, teacher: Tokens, student: Tokens, translation: Translation, **bounds: float
) -> Target:
    """Convert a teacher's rows to a target over the student's vocabulary, one row per student token.

    rows         scores of the teacher tokens first_row … T_teacher − 1
    first_row    0 if the teacher saw BOS in front of the text; 1 if not, as nothing then predicts its first token
    bounds       exact_above: minimum probability of the branches of later rows that the student's tokenizer writes (0:
                 all); carry_above: minimum probability, relative to the text's, of the branches that are carried
    A student position is valid if it begins at or after the first byte of teacher token `first_row`, if the teacher has
    tokens for its bytes, and if no row of its block is masked.

    Raises AlignmentError if the rows do not belong to the tokens or the texts differ. Inputs are not changed.
    """
    return align_byte_chain(rows, first_row, teacher, student, translation, **bounds).target


def align_byte_chain(
    rows: ScoredRows,
    first_row: int,
    teacher: Tokens,
    student: Tokens,
    translation: Translation,
    *,
    exact_above: float = EXACT_ABOVE,
    carry_above: float = CARRY_ABOVE,
) -> ByteChainAlignment:
    """Align as `align` does, and return the boundaries and the carried probability too."""
    check_rows(rows, first_row, teacher)
    if rows.ids.size and int(rows.ids.max()) >= len(translation.pieces):
        raise AlignmentError(
            f"expected candidate ids below {len(translation.pieces)}, the teacher's vocabulary size, "
            f"received {int(rows.ids.max())}"
        )
    cuts = block_cuts(teacher, student, translation)
    if translation.is_identity:  # rows and tokens correspond one to one, even if a normalizer changed the text
        teacher, student = replace(teacher, placement=None), replace(student, placement=None)
    valid = _valid_positions(cuts, first_row, teacher, student)
    if teacher.placement is not None:
        valid &= ~_masked_by_normalizer(cuts, teacher, translation.pieces)
    masked = np.isnan(rows.actual)
    valid &= ~np.repeat(_blocks_with(masked, cuts, first_row), np.diff(cuts.student))
    ids = np.ascontiguousarray(rows.ids, dtype=np.uint32)
    probs = np.exp(rows.logprobs, dtype=np.float32)
    actual = np.exp(np.where(masked, 0.0, rows.actual), dtype=np.float64)
    prob_before = kernels.text_probs_before(actual, first_row, cuts.teacher)
    later_rows, spaced = _rows_to_rewrite(cuts, first_row, teacher, student)
    wanted = (prob_before[later_rows, None] * probs[later_rows] >= exact_above) | spaced[:, None]
    wanted &= ids[later_rows] != teacher.ids[later_rows + first_row, None]
    slots = np.full(len(actual), kernels.NONE, dtype=np.int64)
    slots[later_rows] = np.arange(len(later_rows))
    before = kernels.student_tokens_before(*cuts[:2], teacher.ends, student.ends)
    text = np.frombuffer(teacher.text, dtype=np.uint8)
    offsets, out_ids, out_probs, tail, carried = chain_rows(
        (ids, probs, actual, prob_before),
        (teacher.ids, student.ids, first_row, *before, student.ends, teacher.starts, text),
        tuple(cuts),
        (translation.offsets, translation.tokens, translation.first),
        (slots, *_write_branches(ids, wanted, later_rows, (teacher, student, cuts), translation)),
        (*translation.student.trie, *translation.flat),
        valid,
        (len(translation.student), carry_above),
    )
    return ByteChainAlignment(Target(offsets, out_ids, out_probs, tail, valid), cuts, carried)


def _blocks_with(masked: NDArray[np.bool_], cuts: Cuts, first_row: int) -> NDArray[np.bool_]:
    """[B] Return whether a block has a masked row."""
    counts = np.concatenate([np.zeros(first_row + 1, dtype=np.int64), np.cumsum(masked)])
    return np.diff(counts[cuts.teacher]) > 0


def check_rows(rows: ScoredRows, first_row: int, teacher: Tokens) -> None:
    """Raise AlignmentError if there is not one row for each token from `first_row` on."""
    if len(rows.actual) != len(teacher) - first_row:
        raise AlignmentError(
            f"expected {len(teacher) - first_row} rows ({len(teacher)} teacher tokens from {first_row}), "
            f"received {len(rows.actual)}"
        )


def block_cuts(teacher: Tokens, student: Tokens, translation: Translation) -> Cuts:
    """Return the boundaries of the blocks: the common boundaries, or every token if both tokenizers are the same."""
    if translation.is_identity and np.array_equal(teacher.ids, student.ids):
        every = np.arange(len(teacher) + 1)
        return Cuts(every, every, np.concatenate([[0], teacher.ends]))
    return common_cuts(teacher, student)


def _valid_positions(cuts: Cuts, first_row: int, teacher: Tokens, student: Tokens) -> NDArray[np.bool_]:
    """[T] Return which positions begin at or after the first byte of the first row's token."""
    valid = np.zeros(len(student), dtype=bool)
    block = int(np.searchsorted(cuts.teacher, first_row))  # first boundary at or after the first row
    valid[cuts.student[block] :] = True
    if cuts.teacher[block] != first_row and block > 0:  # the rows begin inside a block
        first_byte = teacher.ends[first_row - 1]
        inside = np.arange(cuts.student[block - 1] + 1, cuts.student[block])
        valid[inside] = (student.ends[inside - 1] >= first_byte) & (first_byte > 0)
    return valid


def _masked_by_normalizer(cuts: Cuts, teacher: Tokens, pieces: tuple[bytes | None, ...]) -> NDArray[np.bool_]:
    """[T] Return the positions about which a teacher with a normalizer gives no information.

    A whole block is masked if some of its bytes are in no teacher token, or in the unknown token, whose probability
    would go to any text. If the bytes of the block's tokens differ from the text's, all positions but the first are
    masked: no other branch begins with the text that the student has read there, so the target would repeat the text.
    """
    changed = np.concatenate([[0], np.cumsum(~teacher.written)])[cuts.teacher]
    per_block = np.diff(cuts.student)
    later = np.ones(cuts.student[-1], dtype=bool)
    later[cuts.student[:-1][per_block > 0]] = False
    unknown = np.array([pieces[i] is None for i in teacher.ids.tolist()], dtype=bool)
    unknown &= teacher.ends <= teacher.num_bytes  # a closing EOS has no bytes but is known
    num_unknown = np.concatenate([[0], np.cumsum(unknown)])[cuts.teacher]
    return np.repeat(gaps(cuts, teacher) | (np.diff(num_unknown) > 0), per_block) | (
        later & np.repeat(np.diff(changed) > 0, per_block)
    )


def gaps(cuts: Cuts, teacher: Tokens) -> NDArray[np.bool_]:
    """[B] Return whether some bytes of a block are in no teacher token."""
    block_of_token = np.repeat(np.arange(len(cuts.at) - 1), np.diff(cuts.teacher))
    before = np.maximum(previous_ends(teacher.ends), cuts.at[block_of_token])
    num_gaps = np.bincount(
        block_of_token, weights=(teacher.starts > before) & (teacher.starts != INSIDE), minlength=len(cuts.at) - 1
    )
    last_end = cuts.at[:-1].copy()  # the last known end in each block
    np.maximum.at(last_end, block_of_token, teacher.ends)
    return (num_gaps > 0) | (last_end < cuts.at[1:])


def _rows_to_rewrite(
    cuts: Cuts, first_row: int, teacher: Tokens, student: Tokens
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the rows for which the translation table does not apply [R], and which of them have an added space [R].

    They are the rows that do not begin a block, and the rows at which a tokenizer adds a space. The table has
    candidates that begin at a boundary, without such a space.
    """
    begins = np.zeros(len(teacher), dtype=bool)
    begins[cuts.teacher[:-1][np.diff(cuts.teacher) > 0]] = True
    spaced = teacher.own_space.copy()
    if student.placement is not None:
        has_student = np.diff(cuts.student) > 0
        student_space = np.zeros(len(has_student), dtype=bool)
        student_space[has_student] = student.own_space[cuts.student[:-1][has_student]]
        spaced |= np.repeat(student_space, np.diff(cuts.teacher))
    rows = np.flatnonzero((~begins | spaced)[first_row:])
    return rows, spaced[rows + first_row]


def _write_branches(
    ids: NDArray[np.uint32],
    wanted: NDArray[np.bool_],
    later_rows: NDArray[np.int64],
    text: tuple[Tokens, Tokens, Cuts],
    translation: Translation,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    """Write the wanted branches with the student's tokenizer: [R, K] index (NONE if not wanted), offsets, tokens."""
    (teacher, student, cuts), token_bytes = text, translation.pieces
    tokens = later_rows + len(teacher) - len(ids)
    blocks = np.searchsorted(cuts.teacher, tokens, side="right") - 1
    before = [
        _teacher_bytes(teacher, translation, begin, end)
        for begin, end in zip(cuts.teacher[blocks].tolist(), tokens.tolist(), strict=True)
    ]
    if student.placement is not None and len(student):
        spaces = student.own_space[np.minimum(cuts.student[blocks], len(student) - 1)]
        before = [b" " + data if space else data for data, space in zip(before, spaces.tolist(), strict=True)]
    row, k = np.nonzero(wanted)
    candidates = ids[later_rows[row], k].tolist()
    # A special token has no bytes: its branch ends at its position.
    pieces = [token_bytes[x] or b"" for x in candidates]
    if teacher.placement is not None:
        spaces = teacher.own_space[tokens[row]]
        pieces = [p.removeprefix(b" ") if space else p for p, space in zip(pieces, spaces.tolist(), strict=True)]
    index = np.full(wanted.shape, kernels.NONE, dtype=np.int64)
    index[row, k] = np.arange(len(pieces))
    return index, *translation.write([before[r] + p for r, p in zip(row.tolist(), pieces, strict=True)])


def _teacher_bytes(teacher: Tokens, translation: Translation, begin: int, end: int) -> bytes:
    """Return the bytes of the teacher tokens begin … end − 1, without spaces that the tokenizer added."""
    pieces = [translation.pieces[i] or b"" for i in teacher.ids[begin:end].tolist()]
    if teacher.placement is not None:
        spaces = teacher.own_space[begin:end].tolist()
        pieces = [p.removeprefix(b" ") if space else p for p, space in zip(pieces, spaces, strict=True)]
    return b"".join(pieces)
