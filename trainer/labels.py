"""What the positions of a batch should predict, as tensors: the text's tokens, and rows of targets side by side."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from alignment.target import Target

# torch legend: T positions of a batch, K listed tokens


@dataclass(frozen=True, eq=False)
class Labels:
    """What T positions should predict.

    tokens_T   int64, the text
    ids_TK     int64 listed by the target, distinct within a row; shorter rows repeat their first id (0 where none)
    listed_TK  bool: false where an id is only repeated. The first is always true, so that each id counts once
    probs_TK   float32, 0 where not listed
    tail_T     float32; a position without a target has no mass at all
    """

    tokens_T: Tensor
    ids_TK: Tensor
    listed_TK: Tensor
    probs_TK: Tensor
    tail_T: Tensor

    def __len__(self) -> int:
        return len(self.tokens_T)

    def to(self, device: str) -> "Labels":
        return Labels(*(column.to(device, non_blocking=True) for column in self._columns()))

    def split(self, size: int) -> list["Labels"]:
        return [Labels(*parts) for parts in zip(*(c.split(size) for c in self._columns()), strict=True)]

    def _columns(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]


def labels_from(tokens: Sequence[np.ndarray], targets: Sequence[Target | None]) -> Labels:
    """Labels of several samples, one after another; None where a sample has no target."""
    wide = max([1, *(int(np.diff(t.offsets).max(initial=0)) for t in targets if t is not None)])
    parts = [_dense(0, None, wide), *(_dense(len(t), target, wide) for t, target in zip(tokens, targets, strict=True))]
    columns = (torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True))
    return Labels(torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *tokens])), *columns)


def _dense(length: int, target: Target | None, wide: int) -> tuple[np.ndarray, ...]:
    ids = np.zeros((length, wide), dtype=np.int64)
    listed = np.zeros((length, wide), dtype=bool)
    probs = np.zeros((length, wide), dtype=np.float32)
    listed[:, 0] = True
    if target is None:
        return ids, listed, probs, np.zeros(length, dtype=np.float32)
    if len(target) != length:
        raise ValueError(f"expected a target for {length} positions, received {len(target)}")
    some = np.diff(target.offsets) > 0
    ids[some] = target.ids[target.offsets[:-1][some]][:, None]
    column = np.arange(len(target.ids)) - target.offsets[target.rows]
    ids[target.rows, column] = target.ids
    listed[target.rows, column] = True
    probs[target.rows, column] = target.probs
    return ids, listed, probs, target.tail
