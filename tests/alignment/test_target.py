"""Sparse targets."""

import numpy as np

from alignment.target import target_from_entries


def test_equal_ids_are_summed_and_the_missing_mass_is_tail() -> None:
    target = target_from_entries(
        np.array([0, 0, 1, 0]),
        np.array([7, 3, 2, 7], dtype=np.int32),
        np.array([0.2, 0.3, 0.5, 0.1]),
        np.array([True, True]),
    )
    assert target.ids.tolist() == [3, 7, 2]
    np.testing.assert_allclose(target.probs, [0.3, 0.3, 0.5], rtol=1e-6)
    np.testing.assert_allclose(target.tail, [0.4, 0.5], rtol=1e-6)


def test_invalid_positions_are_empty() -> None:
    target = target_from_entries(
        np.array([0, 1]), np.array([1, 1], dtype=np.int32), np.array([1.0, 1.0]), np.array([False, True])
    )
    assert target.offsets.tolist() == [0, 0, 1]
    assert target.tail.tolist() == [0, 0]


def test_a_row_above_one_by_rounding_is_scaled_to_one() -> None:
    target = target_from_entries(
        np.array([0, 0]), np.array([1, 2], dtype=np.int32), np.array([0.6, 0.4004]), np.array([True])
    )
    assert target.mass[0] <= 1 + 1e-7
    assert target.tail[0] == 0


def test_cut_keeps_the_most_probable_entries_and_adds_the_rest_to_the_tail() -> None:
    target = target_from_entries(
        np.array([0, 0, 0, 1]),
        np.array([5, 6, 7, 9], dtype=np.int32),
        np.array([0.1, 0.5, 0.2, 0.9]),
        np.array([True, True]),
    )
    cut = target.cut(2)
    assert cut.ids.tolist() == [6, 7, 9]
    np.testing.assert_allclose(cut.tail, [0.3, 0.1], rtol=1e-5)


def test_from_position_drops_the_first_rows() -> None:
    target = target_from_entries(
        np.array([0, 1, 2]), np.array([1, 2, 3], dtype=np.int32), np.array([0.5, 0.6, 0.7]), np.ones(3, dtype=bool)
    )
    rest = target.from_position(1)
    assert rest.ids.tolist() == [2, 3]
    assert rest.offsets.tolist() == [0, 1, 2]
    np.testing.assert_allclose(rest.prob_of(np.array([2, 9])), [0.6, 0])
