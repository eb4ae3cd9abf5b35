"""Training labels as tensors: the gold token and sparse soft target of every position, and auxiliary labels.

Shapes: T positions of a batch, K listed tokens.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alignment.target import Target


class AuxiliaryLabels(Protocol):
    """Labels of T positions for the auxiliary loss of one teacher, and the loss itself.

    share        the teacher's share of the total teacher weight
    operates_on  "logits": `loss` receives the logits [C, V] of a chunk and returns the loss [C] and the gradient [C, V]
                 of its weighted sum. "cross_entropy": `loss` receives the cross-entropy [C] of the text's tokens and
                 returns the loss [C] and the factor [C] of the cross-entropy in its gradient, unweighted
    continues_T  bool on the CPU: positions at which a chunk must not begin; None if it may begin everywhere
    """

    operates_on: ClassVar[Literal["logits", "cross_entropy"]]

    @property
    def share(self) -> float: ...

    @property
    def continues_T(self) -> NDArray[np.bool_] | None: ...  # noqa: N802 (a shape suffix)

    def map(self, function: Callable[[Tensor], Tensor]) -> "AuxiliaryLabels":
        """Apply a function to every tensor."""
        ...

    def slice(self, positions: slice) -> "AuxiliaryLabels":
        """Return the labels of consecutive positions."""
        ...

    def loss(self, values: Tensor, labels: "Labels", objective: Any) -> tuple[Tensor, Tensor]:
        """Return the loss and its gradient, as `operates_on` describes. `objective` is a losses.objective.Objective."""
        ...


@dataclass(frozen=True, eq=False)
class Labels:
    """Labels of T positions: gold tokens and sparse soft targets.

    tokens_T   int64, the tokens of the text
    ids_TK     int64, ids that the target lists, distinct within a row; shorter rows are padded with their first id
               (0 if the row is empty)
    listed_TK  bool, false for padding. The first column is always true, so that every id of a row counts once
    probs_TK   float32, 0 where not listed
    tail_T     float32; probs_TK and tail_T are 0 at a position without a target
    auxiliary  labels of auxiliary losses, one entry per teacher that is not fused, in the order of the run file
    """

    tokens_T: Tensor
    ids_TK: Tensor
    listed_TK: Tensor
    probs_TK: Tensor
    tail_T: Tensor
    auxiliary: tuple[AuxiliaryLabels, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens_T)

    def to(self, device: str) -> "Labels":
        """Return the labels with all tensors on a device."""
        auxiliary = tuple(one.map(lambda tensor: tensor.to(device)) for one in self.auxiliary)
        return self._map(lambda column: column.to(device), auxiliary)

    def split(self, size: int) -> list["Labels"]:
        """Split into chunks of `size` positions that do not end inside a span.

        A chunk is shorter where the next span would not fit, and longer where one span alone is longer than `size`.
        Overlapping spans of several teachers count as one span.
        """
        continues = [c for c in (auxiliary.continues_T for auxiliary in self.auxiliary) if c is not None]
        bounds = _chunk_bounds(len(self), size, continues)
        return [self._slice(slice(begin, end)) for begin, end in pairwise(bounds)]

    def _slice(self, positions: slice) -> "Labels":
        auxiliary = tuple(one.slice(positions) for one in self.auxiliary)
        return replace(self._map(lambda column: column[positions], ()), auxiliary=auxiliary)

    def _map(self, function: Callable[[Tensor], Tensor], auxiliary: tuple[AuxiliaryLabels, ...]) -> "Labels":
        columns = (self.tokens_T, self.ids_TK, self.listed_TK, self.probs_TK, self.tail_T)
        tokens_T, ids_TK, listed_TK, probs_TK, tail_T = (function(column) for column in columns)
        return Labels(tokens_T, ids_TK, listed_TK, probs_TK, tail_T, auxiliary)


def _chunk_bounds(length: int, size: int, continues: Sequence[NDArray[np.bool_]]) -> list[int]:
    """Return the first position of every chunk and the end of the last one; at least one chunk, even if empty."""
    if not continues or not length:
        return [*range(0, max(length, 1), size), length]
    # positions where no teacher's span continues: chunks may begin there
    starts, bounds = [*np.flatnonzero(~np.logical_or.reduce(continues)).tolist(), length], [0]
    while bounds[-1] < length:
        last = bisect_right(starts, bounds[-1] + size) - 1
        bounds.append(starts[last] if starts[last] > bounds[-1] else starts[last + 1])
    return bounds


def labels_from(tokens: Sequence[np.ndarray], targets: Sequence[Target | None]) -> Labels:
    """Build the labels of a batch: the labels of its samples, concatenated.

    tokens   gold ids of each sample
    targets  soft targets of each sample, of the same length; None for a sample without soft targets
    Raises ValueError if the lengths differ.
    """
    filled = [Target.empty(len(t)) if target is None else target for t, target in zip(tokens, targets, strict=True)]
    for own, target in zip(tokens, filled, strict=True):
        if len(own) != len(target):
            raise ValueError(f"expected a target for {len(own)} positions, received {len(target)}")
    length_T = _concatenate([np.diff(target.offsets) for target in filled], np.int64)
    listed_TK = np.arange(max(length_T.max(initial=0), 1)) < length_T[:, None]
    ids_TK, probs_TK = np.zeros(listed_TK.shape, dtype=np.int64), np.zeros(listed_TK.shape, dtype=np.float32)
    ids_TK[listed_TK] = _concatenate([target.ids for target in filled], np.int32)
    probs_TK[listed_TK] = _concatenate([target.probs for target in filled], np.float32)
    np.copyto(ids_TK, ids_TK[:, :1], where=~listed_TK)
    listed_TK[:, 0] = True
    tail_T = _concatenate([target.tail for target in filled], np.float32)
    columns = (_concatenate(tokens, np.int64), ids_TK, listed_TK, probs_TK, tail_T)
    text, ids, listed, probs, tail = (torch.from_numpy(column) for column in columns)
    return Labels(text, ids, listed, probs, tail)


def _concatenate(arrays: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    """Concatenate arrays; without arrays, return an empty array of the given type."""
    return np.concatenate([np.zeros(0, dtype=dtype), *arrays])
