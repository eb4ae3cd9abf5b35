"""Fusion: what must hold for any targets."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from alignment.target import Target, target_from_entries
from trainer.fusion import METHODS, fuse

VOCAB_SIZE, POSITIONS = 12, 6


def random_target(seed: int, holes: bool = True) -> Target:
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(VOCAB_SIZE + 1, 0.3), size=POSITIONS)[:, :VOCAB_SIZE]
    probs[rng.random(probs.shape) < 0.3] = 0
    valid = rng.random(POSITIONS) < 0.7 if holes else np.ones(POSITIONS, dtype=bool)
    rows, ids = np.nonzero(probs)
    return target_from_entries(rows, ids.astype(np.int32), probs[rows, ids], valid)


def dense(target: Target) -> NDArray[np.float64]:
    """[T, V + 1] with the tail in the last column."""
    out = np.zeros((len(target), VOCAB_SIZE + 1))
    out[target.rows, target.ids] = target.probs
    out[:, -1] = target.tail
    return out


SEEDS = st.lists(st.integers(0, 10_000), min_size=1, max_size=5, unique=True)
LABELS = np.arange(POSITIONS) % VOCAB_SIZE


@pytest.mark.parametrize("method", METHODS)
@given(seeds=SEEDS)
def test_mass_and_tail_sum_to_one_where_anyone_is_valid(method: str, seeds: list[int]) -> None:
    targets = [random_target(s) for s in seeds]
    fused = fuse(targets, LABELS, [1.0] * len(targets), method, top_k=5)
    anyone = np.logical_or.reduce([t.valid for t in targets])
    np.testing.assert_array_equal(fused.target.valid, anyone)
    np.testing.assert_allclose((fused.target.mass + fused.target.tail)[anyone], 1, atol=1e-6)
    assert np.diff(fused.target.offsets).max(initial=0) <= 5
    assert fused.shares_N.sum() == pytest.approx(1.0 if anyone.any() else 0.0)


@pytest.mark.parametrize("method", METHODS)
@given(seed=st.integers(0, 10_000), copies=st.integers(1, 4))
def test_copies_of_one_teacher_fuse_to_it(method: str, seed: int, copies: int) -> None:
    target = random_target(seed)
    fused = fuse([target] * copies, LABELS, [1.0] * copies, method).target
    np.testing.assert_allclose(dense(fused), dense(target), atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@given(seeds=SEEDS, random=st.randoms())
def test_the_order_of_teachers_does_not_matter(method: str, seeds: list[int], random) -> None:  # type: ignore[no-untyped-def]
    weights = dict(zip(seeds, np.random.default_rng(0).random(len(seeds)) + 0.1, strict=True))
    shuffled = list(seeds)
    random.shuffle(shuffled)
    one, two = (
        fuse([random_target(s) for s in order], LABELS, [weights[s] for s in order], method).target
        for order in (seeds, shuffled)
    )
    np.testing.assert_allclose(dense(one), dense(two), atol=1e-6)


@given(seeds=SEEDS)
def test_a_mean_lies_between_its_teachers_and_is_the_weighted_sum(seeds: list[int]) -> None:
    targets = [random_target(s, holes=False) for s in seeds]
    weights = np.random.default_rng(1).random(len(seeds)) + 0.1
    fused = dense(fuse(targets, LABELS, weights.tolist()).target)
    expected = sum(w * dense(t) for w, t in zip(weights / weights.sum(), targets, strict=True))
    np.testing.assert_allclose(fused, expected, atol=1e-6)


def test_a_teacher_without_an_answer_is_left_out_there_and_the_shares_say_so() -> None:
    one, two = random_target(1, holes=False), random_target(2, holes=False)
    gap = Target(two.offsets, two.ids, two.probs, two.tail, np.arange(POSITIONS) >= 3)
    gap = target_from_entries(gap.rows, gap.ids, gap.probs, gap.valid)
    fused = fuse([one, gap], LABELS, [1.0, 1.0])
    np.testing.assert_allclose(dense(fused.target)[:3], dense(one)[:3], atol=1e-6)
    np.testing.assert_allclose(fused.shares_N, [0.75, 0.25])


def test_min_ce_takes_the_teacher_that_predicts_the_sample_best() -> None:
    good = target_from_entries(
        np.arange(POSITIONS), LABELS.astype(np.int32), np.full(POSITIONS, 0.9), np.ones(POSITIONS, dtype=bool)
    )
    bad = random_target(4, holes=False)
    fused = fuse([bad, good], LABELS, [5.0, 1.0], "min_ce")
    np.testing.assert_allclose(dense(fused.target), dense(good), atol=1e-6)
    assert fused.shares_N.tolist() == [0, 1]


def test_targets_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 6 positions"):
        fuse([random_target(1), random_target(2).after(1)], LABELS, [1.0, 1.0])


def test_targets_are_not_changed() -> None:
    targets = [random_target(1), random_target(2)]
    before = [dense(t) for t in targets]
    fuse(targets, LABELS, [1.0, 2.0], "mean", top_k=2)
    for target, was in zip(targets, before, strict=True):
        np.testing.assert_array_equal(dense(target), was)
