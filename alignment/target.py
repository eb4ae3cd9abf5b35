"""Target: a distribution over the student's vocabulary at every position, sparse, with a tail.

Rows have different lengths, because a block of several tokens has more branches than one token has candidates. They
are stored one after another with offsets, as in Arrow and CSR. Values are probabilities, not log-probabilities:
alignment and fusion add them, and an id that is not listed has probability exactly 0 apart from the tail.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Target:
    """Sparse distributions for T student positions, with nnz entries in total.

    offsets  [T + 1] int64: row i has the entries offsets[i] … offsets[i + 1] − 1
    ids      [nnz] int32 student token ids, distinct within a row, in no particular order
    probs    [nnz] float32 probabilities
    tail     [T] float32 probability of all ids that are not listed; row sum + tail = 1 at a valid position
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
    def empty(cls, num_positions: int) -> "Target":
        """Build a target without a valid position."""
        entries = np.zeros(0)
        valid = np.zeros(num_positions, dtype=bool)
        return target_from_entries(entries.astype(np.int64), entries.astype(np.int32), entries, valid)

    @property
    def nbytes(self) -> int:
        """Size of the arrays in bytes."""
        return sum(a.nbytes for a in (self.offsets, self.ids, self.probs, self.tail, self.valid))

    @property
    def rows(self) -> NDArray[np.int64]:
        """[nnz] position of each entry."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    @property
    def mass(self) -> NDArray[np.float64]:
        """[T] listed probability per position; 0 at an invalid position."""
        return _sum_by_row(self.rows, self.probs, len(self))

    def prob_of(self, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """[T] listed probability of one id per position; 0 if it is not listed."""
        hit = self.ids == ids[self.rows]
        return _sum_by_row(self.rows[hit], self.probs[hit], len(self))

    def from_position(self, position: int) -> "Target":
        """Return the rows from `position` to the end."""
        entry = self.offsets[position]
        return Target(
            offsets=self.offsets[position:] - entry,
            ids=self.ids[entry:],
            probs=self.probs[entry:],
            tail=self.tail[position:],
            valid=self.valid[position:],
        )

    def select(self, wanted: NDArray[np.bool_]) -> "Target":
        """Return the rows at which `wanted` [T] is true."""
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
        """Keep the `top_k` most probable entries of each row (ties: the lowest ids) and add the rest to the tail."""
        order = np.lexsort((self.ids, -self.probs, self.rows))
        rank = np.arange(len(self.ids)) - self.offsets[self.rows]
        keep = np.sort(order[rank < top_k])
        return target_from_entries(self.rows[keep], self.ids[keep], self.probs[keep], self.valid)


def target_from_entries(
    rows: NDArray[np.int64], ids: NDArray[np.int32], probs: NDArray[np.floating], valid: NDArray[np.bool_]
) -> Target:
    """Build a target: sum entries of equal (row, id), drop entries of invalid rows, add the missing mass to the tail.

    A row that exceeds 1, because the wire format rounds to half precision, is scaled to 1.
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
    excess = np.maximum(mass, 1.0)
    return Target(
        offsets=np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(valid)))]).astype(np.int64),
        ids=ids.astype(np.int32),
        probs=(probs / excess[rows]).astype(np.float32),
        tail=np.where(valid, np.maximum(1.0 - mass, 0.0), 0.0).astype(np.float32),
        valid=valid.copy(),
    )


def _sum_by_row(rows: NDArray[np.int64], values: NDArray[np.floating], num_rows: int) -> NDArray[np.float64]:
    return np.bincount(rows, weights=values, minlength=num_rows).astype(np.float64)
