"""The order of samples: a function of seed, epoch and offset, so that a run can resume at any step.

If the weight of a source is not a whole number, an epoch draws only some of its windows, and the next epoch continues
with the others: every window is drawn once before any window is drawn again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

# Streams of random numbers of one seed. Streams 0 and 1 draw held-out documents and data.max_samples.
ORDER, ROUND, DROPOUT, ROLLOUT, SHARE, HELD_OUT = 2, 3, 4, 5, 6, 7


@dataclass(frozen=True)
class SampleOrder:
    """The order of the samples of several sources. Sample indices count through the sources one after another.

    counts  number of windows of each source
    draws   number of windows that one epoch draws from each source
    """

    counts: tuple[int, ...]
    draws: tuple[int, ...]
    seed: int

    @property
    def epoch_samples(self) -> int:
        return sum(self.draws)


def weighted_order(counts: Sequence[int], weights: Sequence[float], seed: int) -> SampleOrder:
    """Build the order in which an epoch draws round(weight · windows) windows from each source."""
    draws = [round(count * weight) for count, weight in zip(counts, weights, strict=True)]
    return SampleOrder(tuple(counts), tuple(draws), seed)


def batch_indices(order: SampleOrder, batch_samples: int, step: int, epochs: int) -> list[int]:
    """Return the sample indices of one step of a run over some epochs.

    A batch may contain the end of an epoch and the beginning of the next. The last batch may be smaller.
    """
    size = order.epoch_samples
    begin, end = step * batch_samples, min((step + 1) * batch_samples, epochs * size)
    indices: list[int] = []
    for epoch in range(begin // size, (end - 1) // size + 1):
        part = slice(max(begin - epoch * size, 0), end - epoch * size)
        indices += epoch_indices(order, epoch)[part].tolist()
    return indices


@lru_cache(maxsize=2)  # a batch may need two epochs
def epoch_indices(order: SampleOrder, epoch: int) -> NDArray[np.int64]:
    """[epoch_samples] Return all sample indices of an epoch, in order."""
    firsts = np.cumsum([0, *order.counts])
    drawn = [firsts[source] + _drawn_windows(order, source, epoch) for source in range(len(order.counts))]
    indices: NDArray[np.int64] = np.concatenate(drawn)
    np.random.default_rng([order.seed, ORDER, epoch]).shuffle(indices)
    indices.flags.writeable = False
    return indices


def _drawn_windows(order: SampleOrder, source: int, epoch: int) -> NDArray[np.int64]:
    """[draws] Return the windows that an epoch draws from a source.

    The draws of all epochs form one sequence of rounds. A round is a permutation of all windows; epoch e takes the
    positions [e · draws, (e + 1) · draws) of the sequence, and may begin or end within a round.
    """
    count, draws = order.counts[source], order.draws[source]
    begin, end = epoch * draws, (epoch + 1) * draws
    drawn = [np.empty(0, dtype=np.int64)]
    for number in range(begin // count, -(-end // count)) if count else ():
        part = slice(max(begin - number * count, 0), end - number * count)
        is_complete = part.start == 0 and part.stop >= count
        # The shuffle of the epoch hides the order of a complete round, so that no permutation is necessary.
        windows = np.arange(count) if is_complete else _round(order, source, number)
        drawn.append(windows[part])
    return np.concatenate(drawn)


def _round(order: SampleOrder, source: int, number: int) -> NDArray[np.int64]:
    return np.random.default_rng([order.seed, ROUND, source, number]).permutation(order.counts[source])
