"""The order of samples: a function of (seed, epoch, offset) alone, so that a run can go on anywhere.

Epochs follow one another without a gap. A source whose weight is not whole goes on in the next epoch where it stopped
in this one: each of its windows comes once before any comes again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

ORDER, ROUND, DROPOUT = 2, 3, 4  # streams of the seed; 0 and 1 draw held-out documents and data.max_samples


@dataclass(frozen=True)
class Order:
    """counts: windows of each source; draws: how many of them come in one epoch; samples count source by source."""

    counts: tuple[int, ...]
    draws: tuple[int, ...]
    seed: int

    @property
    def epoch_samples(self) -> int:
        return sum(self.draws)


def weighted(counts: Sequence[int], weights: Sequence[float], seed: int) -> Order:
    """As many draws as weight · windows, rounded."""
    draws = [round(count * weight) for count, weight in zip(counts, weights, strict=True)]
    return Order(tuple(counts), tuple(draws), seed)


def batch_indices(order: Order, batch_samples: int, step: int) -> list[int]:
    """Sample indices of one step; a batch may hold the end of one epoch and the beginning of the next."""
    begin, end, size = step * batch_samples, (step + 1) * batch_samples, order.epoch_samples
    indices: list[int] = []
    for epoch in range(begin // size, (end - 1) // size + 1):
        part = slice(max(begin - epoch * size, 0), end - epoch * size)
        indices += epoch_order(order, epoch)[part].tolist()
    return indices


@lru_cache(maxsize=2)  # a batch may need two
def epoch_order(order: Order, epoch: int) -> NDArray[np.int64]:
    """[epoch_samples] every sample index of an epoch."""
    firsts = np.cumsum([0, *order.counts])
    drawn = [firsts[source] + _drawn(order, source, epoch) for source in range(len(order.counts))]
    indices: NDArray[np.int64] = np.concatenate(drawn)
    np.random.default_rng([order.seed, ORDER, epoch]).shuffle(indices)
    indices.flags.writeable = False
    return indices


def _drawn(order: Order, source: int, epoch: int) -> NDArray[np.int64]:
    """The windows of a source in an epoch, of its rounds through all of them: rounds are cut by the ends of epochs."""
    count, draws = order.counts[source], order.draws[source]
    begin, end = epoch * draws, (epoch + 1) * draws
    parts = [np.empty(0, dtype=np.int64)]
    for number in range(begin // count, -(-end // count)) if count else ():
        part = slice(max(begin - number * count, 0), end - number * count)
        is_whole = part.start == 0 and part.stop >= count  # then its own order is lost in the epoch's
        whole = np.arange(count) if is_whole else _round(order, source, number)
        parts.append(whole[part])
    return np.concatenate(parts)


def _round(order: Order, source: int, number: int) -> NDArray[np.int64]:
    return np.random.default_rng([order.seed, ROUND, source, number]).permutation(order.counts[source])
