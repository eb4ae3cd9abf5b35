"""What the positions of a batch should predict, as tensors: the text's tokens, and rows of targets side by side."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
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
class Spans:
    """How likely one teacher finds stretches of the text: disjoint spans of neighbours among T positions.

    back_T      int64: how many positions back the position's span begins; −1 where there is none
    logprobs_T  float32 nats, of the teacher for all of the position's span; any where there is none
    joined_T    back_T > 0, always on the CPU: between such a position and the one before it labels are not cut
    share       of what all teachers weigh in the loss
    """

    back_T: Tensor
    logprobs_T: Tensor
    joined_T: NDArray[np.bool_]
    share: float

    @classmethod
    def of(cls, back_T: np.ndarray, logprobs_T: np.ndarray, share: float) -> "Spans":
        return cls(torch.from_numpy(back_T), torch.from_numpy(logprobs_T), back_T > 0, share)


@dataclass(frozen=True, eq=False)
class Labels:
    """What T positions should predict.

    tokens_T   int64, the text
    ids_TK     int64 listed by the target, distinct within a row; shorter rows repeat their first id (0 where none)
    listed_TK  bool: false where an id is only repeated. The first is always true, so that each id counts once
    probs_TK   float32, 0 where not listed
    tail_T     float32; a position without a target has no mass at all
    spreads, spans  of teachers whose tokens have no names here
    """

    tokens_T: Tensor
    ids_TK: Tensor
    listed_TK: Tensor
    probs_TK: Tensor
    tail_T: Tensor
    spreads: tuple[Spread, ...] = ()
    spans: tuple[Spans, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens_T)

    def to(self, device: str) -> "Labels":
        return self._each(lambda column: column.to(device))

    def split(self, size: int) -> list["Labels"]:
        """Chunks of `size` positions: fewer where a span would be cut in two, more where one alone is longer.

        Overlapping spans of several teachers count as one.
        """
        bounds = _bounds(len(self), size, [spans.joined_T for spans in self.spans])
        return [self._part(slice(begin, end)) for begin, end in pairwise(bounds)]

    def _part(self, which: slice) -> "Labels":
        part = self._each(lambda column: column[which])
        return replace(part, spans=tuple(replace(s, joined_T=s.joined_T[which]) for s in part.spans))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Labels":
        own = (self.tokens_T, self.ids_TK, self.listed_TK, self.probs_TK, self.tail_T)
        tokens_T, ids_TK, listed_TK, probs_TK, tail_T = (change(column) for column in own)
        spreads = (replace(s, probs_TK=change(s.probs_TK), tail_T=change(s.tail_T)) for s in self.spreads)
        spans = (replace(s, back_T=change(s.back_T), logprobs_T=change(s.logprobs_T)) for s in self.spans)
        return Labels(tokens_T, ids_TK, listed_TK, probs_TK, tail_T, tuple(spreads), tuple(spans))


def _bounds(length: int, size: int, joined: Sequence[NDArray[np.bool_]]) -> list[int]:
    """Where chunks begin, and the end of the last; one chunk even of nothing."""
    if not joined or not length:
        return [*range(0, max(length, 1), size), length]
    starts, bounds = [*np.flatnonzero(~np.logical_or.reduce(joined)).tolist(), length], [0]
    while bounds[-1] < length:
        last = bisect_right(starts, bounds[-1] + size) - 1
        bounds.append(starts[last] if starts[last] > bounds[-1] else starts[last + 1])
    return bounds


def labels_from(tokens: Sequence[np.ndarray], targets: Sequence[Target | None]) -> Labels:
    """Labels of several samples, one after another; None where a sample has no target."""
    said = [Target.nothing(len(t)) if target is None else target for t, target in zip(tokens, targets, strict=True)]
    for own, target in zip(tokens, said, strict=True):
        if len(own) != len(target):
            raise ValueError(f"expected a target for {len(own)} positions, received {len(target)}")
    length_T = _joined([np.diff(target.offsets) for target in said], np.int64)
    listed_TK = np.arange(max(length_T.max(initial=0), 1)) < length_T[:, None]
    ids_TK, probs_TK = np.zeros(listed_TK.shape, dtype=np.int64), np.zeros(listed_TK.shape, dtype=np.float32)
    ids_TK[listed_TK] = _joined([target.ids for target in said], np.int32)
    probs_TK[listed_TK] = _joined([target.probs for target in said], np.float32)
    np.copyto(ids_TK, ids_TK[:, :1], where=~listed_TK)
    listed_TK[:, 0] = True
    tail_T = _joined([target.tail for target in said], np.float32)
    columns = (_joined(tokens, np.int64), ids_TK, listed_TK, probs_TK, tail_T)
    text, ids, listed, probs, tail = (torch.from_numpy(column) for column in columns)
    return Labels(text, ids, listed, probs, tail)


def _joined(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    """One after another; nothing, of its type, where there are none."""
    return np.concatenate([np.zeros(0, dtype=dtype), *parts])
