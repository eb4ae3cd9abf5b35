"""The order of samples depends on seed, epoch and offset alone, and follows the weights of the sources."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.sources.sample_order import SampleOrder, batch_indices, epoch_indices, weighted_order

SOURCES = st.lists(
    st.tuples(st.integers(1, 12), st.sampled_from([0.5, 0.75, 1, 1.3, 2, 2.5, 3])), min_size=1, max_size=3
)


def order_of(sources: list[tuple[int, float]], seed: int) -> SampleOrder:
    """Build an order with at least one draw from each source."""
    order = weighted_order([count for count, _ in sources], [weight for _, weight in sources], seed)
    return SampleOrder(order.counts, tuple(max(draws, 1) for draws in order.draws), seed)


@given(SOURCES, st.integers(0, 5), st.integers(1, 5))
def test_every_window_is_drawn_as_often_as_the_weights_require(
    sources: list[tuple[int, float]], seed: int, epochs: int
) -> None:
    order = order_of(sources, seed)
    seen = Counter(i for epoch in range(epochs) for i in epoch_indices(order, epoch).tolist())
    first = 0
    for count, draws in zip(order.counts, order.draws, strict=True):
        times = [seen[i] for i in range(first, first + count)]
        assert sum(times) == epochs * draws
        assert max(times) - min(times) <= 1
        first += count
    assert sum(seen.values()) == epochs * order.epoch_samples


@given(SOURCES, st.integers(0, 5), st.integers(1, 9), st.integers(1, 9))
def test_the_order_does_not_depend_on_batch_size_or_first_step(
    sources: list[tuple[int, float]], seed: int, batch: int, other: int
) -> None:
    order = order_of(sources, seed)
    whole = np.concatenate([epoch_indices(order, epoch) for epoch in range(4)]).tolist()
    for size in (batch, other, len(whole)):
        for step in reversed(range(-(-len(whole) // size))):  # the last batch may be smaller
            assert batch_indices(order, size, step, epochs=4) == whole[step * size : (step + 1) * size]


def test_weight_one_half_draws_the_other_half_in_the_next_epoch() -> None:
    order = weighted_order([10, 6], [0.5, 2], seed=3)
    assert order.draws == (5, 12)
    halves = [[i for i in epoch_indices(order, epoch).tolist() if i < 10] for epoch in (0, 1)]
    assert sorted(halves[0] + halves[1]) == list(range(10))
    assert sorted(i for i in epoch_indices(order, 0).tolist() if i >= 10) == sorted([*range(10, 16)] * 2)


@pytest.mark.parametrize("weight", [0.5, 1, 2, 2.5])
def test_epochs_and_seeds_have_different_orders(weight: float) -> None:
    order, another = weighted_order([20], [weight], seed=0), weighted_order([20], [weight], seed=1)
    assert epoch_indices(order, 0).tolist() != epoch_indices(order, 1).tolist()
    assert epoch_indices(order, 0).tolist() != epoch_indices(another, 0).tolist()


def test_sources_are_mixed_within_an_epoch() -> None:
    order = weighted_order([200, 200], [1, 1], seed=0)
    first_half = epoch_indices(order, 0)[:200]
    assert 70 < int((first_half < 200).sum()) < 130
