"""Packing of samples into rows: several samples share a row and do not attend to each other.

A row is as long as the longest sample, so attention costs at most what it costs for that sample; shorter samples share
rows. The positions of every sample start at 0, from which transformers builds block-diagonal attention masks. The
padding at the end of a row continues the positions of its last sample, which precedes it and cannot attend to it.

As soon as one row has two samples, all rows need a mask, which on a GPU prevents torch from using flash attention. The
cost was not measured.
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
    states_T              int64, indices of the selected states among B · L, in the order of the samples
    is_token_BL           bool, False for padding
    """

    ids_BL: Ints
    positions_BL: Ints
    states_T: Ints
    is_token_BL: NDArray[np.bool_]


def pack(sequences: Sequence[Ints], masks: Sequence[NDArray[np.bool_]], *, share_rows: bool = True) -> Packed:
    """Pack sequences into rows. masks[i] selects the tokens of sequence i, from the first on, whose states are used.

    Without `share_rows` every sequence has its own row. Without sequences, the result is one row of one unused token,
    so that a rank with an empty shard of the batch can still take part in the forward pass.
    """
    longest = max(map(len, sequences), default=1)
    lengths = [len(s) for s in sequences]
    rows = first_fit_decreasing(lengths, longest) if share_rows else [[i] for i in range(len(sequences))]
    ids_BL = np.zeros((max(len(rows), 1), longest), dtype=np.int64)
    positions_BL = np.tile(np.arange(longest), (len(ids_BL), 1))
    is_token_BL = np.zeros(ids_BL.shape, dtype=bool)
    states: list[Ints] = [np.zeros(0, dtype=np.int64)] * len(sequences)
    for row, members in enumerate(rows):
        begin = 0
        for i in members:
            end = begin + len(sequences[i])
            ids_BL[row, begin:end] = sequences[i]
            is_token_BL[row, begin:end] = True
            positions_BL[row, begin:] = np.arange(longest - begin)
            states[i] = row * longest + begin + np.flatnonzero(masks[i])
            begin = end
    return Packed(ids_BL, positions_BL, np.concatenate([np.zeros(0, dtype=np.int64), *states]), is_token_BL)


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return rows of indices whose lengths sum to at most `capacity`.

    Indices are placed in descending order of length, each in the first row with enough space.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, space in enumerate(free) if space >= lengths[i]), None)
        if row is None:
            row = len(rows)
            rows.append([])
            free.append(capacity)
        rows[row].append(i)
        free[row] -= lengths[i]
    return rows
