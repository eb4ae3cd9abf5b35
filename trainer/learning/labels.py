"""What the positions of a batch should predict, as tensors: the text's tokens, and rows of targets side by side."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignment.target import Target

# torch legend: T positions of a batch, K listed tokens


@dataclass(frozen=True, eq=False)
class Spread:
    """How one teacher spreads its mass at T positions, whatever its tokens are called.

    probs_TK  float32, its K largest probabilities in descending order
    tail_T    float32; a position without an answer has no mass at all
    share     of what all teachers weigh in the loss
    """

    probs_TK: Tensor
    tail_T: Tensor
    share: float


@dataclass(frozen=True, eq=False)
class Labels:
    """What T positions should predict.

    tokens_T   int64, the text
    ids_TK     int64 listed by the target, distinct within a row; shorter rows repeat their first id (0 where none)
    listed_TK  bool: false where an id is only repeated. The first is always true, so that each id counts once
    probs_TK   float32, 0 where not listed
    tail_T     float32; a position without a target has no mass at all
    text_weight_T  float32: what the cross-entropy of each token is weighed with, in place of the objective's ce_weight
    spreads    of teachers whose tokens have no names here
    """

    tokens_T: Tensor
    ids_TK: Tensor
    listed_TK: Tensor
    probs_TK: Tensor
    tail_T: Tensor
    text_weight_T: Tensor | None = None
    spreads: tuple[Spread, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens_T)

    def to(self, device: str) -> "Labels":
        return self._each(lambda column: column.to(device))

    def split(self, size: int) -> list["Labels"]:
        return [self._part(slice(begin, begin + size)) for begin in range(0, max(len(self), 1), size)]

    def _part(self, which: slice) -> "Labels":
        return self._each(lambda column: column[which])

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Labels":
        spreads = tuple(replace(s, probs_TK=change(s.probs_TK), tail_T=change(s.tail_T)) for s in self.spreads)
        columns: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = {name: change(value) for name, value in columns.items() if isinstance(value, Tensor)}
        return replace(self, **changed, spreads=spreads)


def labels_from(tokens: Sequence[np.ndarray], targets: Sequence[Target | None]) -> Labels:
    """Labels of several samples, one after another; None where a sample has no target."""
    wide = max([1, *(int(np.diff(t.offsets).max(initial=0)) for t in targets if t is not None)])
    parts = [_dense(0, None, wide), *(_dense(len(t), target, wide) for t, target in zip(tokens, targets, strict=True))]
    ids, listed, probs, tail = (torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True))
    return Labels(torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *tokens])), ids, listed, probs, tail)


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
