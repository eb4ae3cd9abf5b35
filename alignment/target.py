"""Target: what teachers say the student should predict, sparse over the student's vocabulary.

Rows have different lengths (a block of several tokens has more branches than one token has candidates), so
they are stored one after another with offsets, as Arrow and CSR do. Values are probabilities, not their
logarithms: alignment and fusion add them, absent means exactly 0, and the tail is kept beside them.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Target:
    """Sparse distributions for T student positions, nnz entries in all.

    offsets  [T + 1] int64: row i holds entries offsets[i] … offsets[i + 1]
    ids      [nnz] int32 student token ids, distinct within a row, in no particular order
    probs    [nnz] float32 probabilities
    tail     [T] float32 probability outside the listed ids; row sum + tail = 1 where valid
    valid    [T] bool; an invalid position has no entries and a tail of 0
    """

    offsets: NDArray[np.int64]
    ids: NDArray[np.int32]
    probs: NDArray[np.float32]
    tail: NDArray[np.float32]
    valid: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.valid)

    @classmethod
    def nothing(cls, num_positions: int) -> "Target":
        """No valid position: a teacher that had nothing to say."""
        entries = np.zeros(0)
        valid = np.zeros(num_positions, dtype=bool)
        return target_from_entries(entries.astype(np.int64), entries.astype(np.int32), entries, valid)

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (self.offsets, self.ids, self.probs, self.tail, self.valid))

    @property
    def rows(self) -> NDArray[np.int64]:
        """[nnz] the position that each entry belongs to."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    @property
    def mass(self) -> NDArray[np.float64]:
        """[T] listed probability per position; 0 where invalid."""
        return _sum_by_row(self.rows, self.probs, len(self))

    def prob_of(self, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """[T] listed probability of one id per position; 0 where it is not listed."""
        hit = self.ids == ids[self.rows]
        return _sum_by_row(self.rows[hit], self.probs[hit], len(self))

    def after(self, position: int) -> "Target":
        """The rows from `position` on."""
        entry = self.offsets[position]
        return Target(
            offsets=self.offsets[position:] - entry,
            ids=self.ids[entry:],
            probs=self.probs[entry:],
            tail=self.tail[position:],
            valid=self.valid[position:],
        )

    def take(self, wanted: NDArray[np.bool_]) -> "Target":
        """The rows where `wanted` [T] is true."""
        if wanted.all():
            return self
        entries = wanted[self.rows]
        return Target(
            offsets=np.concatenate([[0], np.cumsum(np.diff(self.offsets)[wanted])]),
            ids=self.ids[entries],
            probs=self.probs[entries],
            tail=self.tail[wanted],
            valid=self.valid[wanted],
        )

    def cut(self, top_k: int) -> "Target":
        """Keep each row's `top_k` likeliest entries (ties to the lowest id); the rest joins the tail."""
        order = np.lexsort((self.ids, -self.probs, self.rows))
        rank = np.arange(len(self.ids)) - self.offsets[self.rows]
        keep = np.sort(order[rank < top_k])
        return target_from_entries(self.rows[keep], self.ids[keep], self.probs[keep], self.valid)


def target_from_entries(
    rows: NDArray[np.int64], ids: NDArray[np.int32], probs: NDArray[np.floating], valid: NDArray[np.bool_]
) -> Target:
    """Sum entries of equal (row, id), drop those of invalid rows, and give what is missing to the tail.

    A row may exceed 1 by the rounding of the wire's half-precision values; it is then scaled back to 1.
    """
    keep = valid[rows] & (probs > 0)
    rows, ids, probs = rows[keep], ids[keep], probs[keep].astype(np.float64)
    order = np.lexsort((ids, rows))
    rows, ids, probs = rows[order], ids[order], probs[order]
    first = np.ones(len(rows), dtype=bool)
    first[1:] = (rows[1:] != rows[:-1]) | (ids[1:] != ids[:-1])
    starts = np.flatnonzero(first)
    rows, ids = rows[starts], ids[starts]
    probs = np.add.reduceat(probs, starts) if len(starts) else probs
    mass = _sum_by_row(rows, probs, len(valid))
    over = np.maximum(mass, 1.0)
    return Target(
        offsets=np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(valid)))]).astype(np.int64),
        ids=ids.astype(np.int32),
        probs=(probs / over[rows]).astype(np.float32),
        tail=np.where(valid, np.maximum(1.0 - mass, 0.0), 0.0).astype(np.float32),
        valid=valid.copy(),
    )


def _sum_by_row(rows: NDArray[np.int64], values: NDArray[np.floating], num_rows: int) -> NDArray[np.float64]:
    return np.bincount(rows, weights=values, minlength=num_rows).astype(np.float64)
