"""Samples side by side in rows, each blind to the others: no padding where lengths differ, no long row that costs more.

A row is as long as the longest sample, so attention costs at most what it costs that sample; shorter ones are put
together in a row as they fit. Where a sample begins its positions begin again at 0, which is what transformers makes
its attention masks from. What is left of a row continues the positions of its last sample, which cannot see it.

As soon as one row has two samples all of them need a mask, which on a GPU keeps torch from flash attention. What that
costs was not measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Packed:
    """B rows of L tokens.

    ids_BL, positions_BL  int64
    states_T              int64: places in the B · L states of those that are wanted, sample after sample
    """

    ids_BL: Ints
    positions_BL: Ints
    states_T: Ints


def pack(sequences: Sequence[Ints], wanted: Sequence[NDArray[np.bool_]], *, together: bool = True) -> Packed:
    """Put sequences into rows. wanted[i] says of which of its tokens, from the first on, the state is used.

    Without `together` every sequence has a row of its own. No sequence at all gives one row of one unused token, so
    that a process whose part of a batch is empty can still take part.
    """
    longest = max(map(len, sequences), default=1)
    rows = fitted([len(s) for s in sequences], longest) if together else [[i] for i in range(len(sequences))]
    ids_BL = np.zeros((max(len(rows), 1), longest), dtype=np.int64)
    positions_BL = np.tile(np.arange(longest), (len(ids_BL), 1))
    states: list[Ints] = [np.zeros(0, dtype=np.int64)] * len(sequences)
    for row, members in enumerate(rows):
        begin = 0
        for i in members:
            end = begin + len(sequences[i])
            ids_BL[row, begin:end] = sequences[i]
            positions_BL[row, begin:] = np.arange(longest - begin)
            states[i] = row * longest + begin + np.flatnonzero(wanted[i])
            begin = end
    return Packed(ids_BL, positions_BL, np.concatenate([np.zeros(0, dtype=np.int64), *states]))


def fitted(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of indices whose lengths sum to at most `capacity`: the longest first, each into the first row it fits."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, free in enumerate(room) if free >= lengths[i]), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(capacity)
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows
