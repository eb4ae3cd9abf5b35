"""Byte-chain alignment: the chain rule over everything a teacher said, in tokens of the student.

Where both tokenizations of a text cut its bytes is a common boundary; between two neighbours lies a block,
teacher tokens t_1…t_p and student tokens u_1…u_q with the same bytes. At each of its rows m the teacher lists
candidates x: each is a branch, the bytes t_1…t_(m−1)·x, with probability P(t_1)…P(t_(m−1))·P_m(x); the text
itself is one more, with P(t_1)…P(t_p). Written in student tokens, the branches that begin with u_1…u_r say what
follows there: each adds its share to its next token, and one that ends there adds to the tail.

Exact: the sum over listed branches. Approximate: a branch is followed for one candidate beyond the text, so a
candidate that ends inside a student token stands for the student's tokenization of the candidate alone.
Cost: blocks of one and one are a gather and a sort; the others are a loop in Python.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from alignment.spans import AlignmentError, Cuts, Tokens, common_cuts
from alignment.target import Target, target_from_entries
from alignment.translation import NONE, Translation


class Rows(Protocol):
    """A teacher's answer for S consecutive tokens of a text, first row = the token it starts at."""

    @property
    def ids(self) -> NDArray[np.integer]: ...  # [S, K] token ids
    @property
    def logprobs(self) -> NDArray[np.floating]: ...  # [S, K] nats
    @property
    def actual(self) -> NDArray[np.floating]: ...  # [S] nats, of the token that stands there


@dataclass(frozen=True)
class _Block:
    teacher: range
    student: range
    begins_at: int


@dataclass(frozen=True)
class _Branch:
    """Continuation bytes for row m of a block, or a ready tokenization for its first row."""

    written: tuple[int, ...] | bytes
    prob: float


Entry = tuple[int, int, float]  # student position, student token, probability


def align(rows: Rows, first_row: int, teacher: Tokens, student: Tokens, translation: Translation) -> Target:
    """Turn a teacher's rows into a target over the student's vocabulary, one row per student token.

    rows         answers for teacher tokens first_row … T_teacher − 1
    first_row    0 where the teacher saw a BOS; 1 where nothing stood before its first token
    A student position is valid if it begins where the teacher has spoken: at or after the first byte of
    teacher token `first_row`.

    Raises AlignmentError if the rows are not those of these tokens or the texts differ. Inputs are not changed.
    """
    if len(rows.actual) != len(teacher) - first_row:
        raise AlignmentError(
            f"expected {len(teacher) - first_row} rows ({len(teacher)} teacher tokens from {first_row}), "
            f"received {len(rows.actual)}"
        )
    cuts = cuts_between(teacher, student, translation)
    valid = _valid_positions(cuts, first_row, teacher, student)
    simple = (np.diff(cuts.teacher) == 1) & (np.diff(cuts.student) == 1) & (cuts.teacher[:-1] >= first_row)
    positions, ids, probs = _simple_entries(rows, first_row, (teacher, student), (cuts, simple), translation)
    entries = list(_complex_entries(rows, first_row, (teacher, student), (cuts, ~simple), translation))
    if entries:
        more = np.array(entries, dtype=[("position", np.int64), ("id", np.int32), ("prob", np.float64)])
        positions = np.concatenate([positions, more["position"]])
        ids = np.concatenate([ids, more["id"]])
        probs = np.concatenate([probs, more["prob"]])
    return target_from_entries(positions, ids, probs, valid)


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


def _simple_entries(
    rows: Rows,
    first_row: int,
    tokens: tuple[Tokens, Tokens],
    blocks: tuple[Cuts, NDArray[np.bool_]],
    translation: Translation,
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float64]]:
    """Blocks of one and one: every candidate but the text's adds to its first student token."""
    (teacher, student), (cuts, chosen) = tokens, blocks
    of_teacher, of_student = cuts.teacher[:-1][chosen], cuts.student[:-1][chosen]
    candidates = rows.ids[of_teacher - first_row].astype(np.int64)
    first = translation.first[candidates]
    keep = (first != NONE) & (candidates != teacher.ids[of_teacher][:, None])
    at = np.broadcast_to(of_student[:, None], candidates.shape)
    probs = np.exp(rows.logprobs[of_teacher - first_row].astype(np.float64))
    actual = np.exp(rows.actual[of_teacher - first_row].astype(np.float64))
    return (
        np.concatenate([at[keep], of_student]),
        np.concatenate([first[keep], student.ids[of_student].astype(np.int32)]),
        np.concatenate([probs[keep], actual]),
    )


def _complex_entries(
    rows: Rows,
    first_row: int,
    tokens: tuple[Tokens, Tokens],
    blocks: tuple[Cuts, NDArray[np.bool_]],
    translation: Translation,
) -> Iterator[Entry]:
    """Blocks of several tokens; all their branches are written in one call of the tokenizer."""
    (teacher, student), (cuts, chosen) = tokens, blocks
    branches = []
    for b in np.flatnonzero(chosen):
        block = _Block(
            range(cuts.teacher[b], cuts.teacher[b + 1]), range(cuts.student[b], cuts.student[b + 1]), int(cuts.at[b])
        )
        branches.append((block, list(_branches(rows, first_row, teacher, block, translation))))
    written = translation.write({x.written for _, each in branches for x in each if isinstance(x.written, bytes)})
    for block, each in branches:
        tokenized = [(written[x.written] if isinstance(x.written, bytes) else x.written, x.prob) for x in each]
        tokenized.append((tuple(student.ids[block.student].tolist()), _text_prob(rows, first_row, block)))
        yield from _chain(tokenized, student.ids[block.student].tolist(), block.student)


def _branches(
    rows: Rows, first_row: int, teacher: Tokens, block: _Block, translation: Translation
) -> Iterator[_Branch]:
    """What the teacher would have written instead, row by row; rows before the first are taken as certain."""
    prefix, weight = b"", 1.0
    for t in block.teacher:
        actual = int(teacher.ids[t])
        if t >= first_row:
            row = t - first_row
            for x, prob in zip(rows.ids[row].tolist(), np.exp(rows.logprobs[row].astype(float)).tolist(), strict=True):
                if x == actual:
                    continue
                data = translation.teacher.token_bytes[x] or b""  # a special token ends the branch at its prefix
                yield _Branch(prefix + data if prefix else translation.of(x), weight * prob)
            weight *= float(np.exp(float(rows.actual[row])))
        prefix += translation.teacher.token_bytes[actual] or b""


def _text_prob(rows: Rows, first_row: int, block: _Block) -> float:
    spoken = [t - first_row for t in block.teacher if t >= first_row]
    return float(np.exp(np.sum(rows.actual[spoken], dtype=np.float64)))


def _chain(branches: list[tuple[tuple[int, ...], float]], text: list[int], positions: range) -> Iterator[Entry]:
    """Walk the student's tokens of the block, keeping the branches that begin as the text does."""
    for r, position in enumerate(positions):
        reached = sum(prob for _, prob in branches) if r else 1.0
        for written, prob in branches:
            if len(written) > r:
                yield position, written[r], prob / reached
        branches = [(w, p) for w, p in branches if len(w) > r and w[r] == text[r]]
