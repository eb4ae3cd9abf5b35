"""Drawing of curves: downsampling keeps spikes, averages stay within the data, axes have round numbers."""

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.report.formatting import format_compact, format_number
from trainer.report.svg import Curve, downsample, draw, moving_average

columns = st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(math.nan)), min_size=1, max_size=400)


def points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path)]


@given(columns, st.integers(4, 60))
def test_downsampling_keeps_the_extremes_and_the_order(values: list[float], max_points: int) -> None:
    y = np.array(values)
    kept = downsample(y, max_points)
    assert len(kept) <= max_points or len(kept) == len(y) <= max_points
    assert np.all(np.diff(kept) > 0)
    if not np.isnan(y).all():
        assert np.nanmin(y[kept]) == np.nanmin(y)
        assert np.nanmax(y[kept]) == np.nanmax(y)


def test_a_spike_of_one_step_in_a_million_stays_visible() -> None:
    y = np.ones(1_000_000)
    y[123_456] = 50.0
    (shape,) = draw([Curve("loss", np.arange(1_000_000, dtype=np.float64), y)], y_range=(0.0, 50.0)).shapes
    drawn = points(shape.path)
    assert len(drawn) <= 1000
    x, top = min(drawn, key=lambda p: p[1])
    assert top == 0.0
    assert x == pytest.approx(123.5, abs=0.1)


def test_a_long_gap_stays_a_gap_after_downsampling() -> None:
    y = np.ones(10_000)
    y[4000:6000] = np.nan
    (shape,) = draw([Curve("t", np.arange(10_000, dtype=np.float64), y)]).shapes
    assert shape.path.count("M") == 2
    assert not [x for x, _ in points(shape.path) if 402 < x < 598]


@given(columns, st.integers(1, 50))
def test_a_moving_average_is_between_the_extremes_and_keeps_gaps(values: list[float], window: int) -> None:
    y = np.array(values)
    means = moving_average(y, window)
    assert np.array_equal(np.isnan(means), np.isnan(y))
    if not np.isnan(y).all():
        slack = 1e-6 * (1 + np.nanmax(np.abs(y)))
        assert np.nanmin(means) >= np.nanmin(y) - slack
        assert np.nanmax(means) <= np.nanmax(y) + slack


def test_stacked_curves_are_drawn_on_top_of_each_other() -> None:
    x = np.array([0.0, 1.0])
    chart = draw(
        [Curve("a", x, np.array([1.0, 3.0])), Curve("b", x, np.array([3.0, 1.0]))], y_range=(0, 4), stacked=True
    )
    first, second = (points(shape.path) for shape in chart.shapes)
    assert first == [(0.0, 750.0), (1000.0, 250.0), (1000.0, 1000.0), (0.0, 1000.0)]
    assert second == [(0.0, 0.0), (1000.0, 0.0), (1000.0, 250.0), (0.0, 750.0)]
    assert [shape.last for shape in chart.shapes] == ["3.0000", "1.0000"]


def test_one_measurement_is_a_dot_and_a_constant_has_an_axis() -> None:
    one = draw([Curve("a", np.array([7.0]), np.array([0.5]))])
    assert one.shapes[0].path.endswith("h0")
    assert one.y_range[0] < 0.5 < one.y_range[1]
    zero = draw([Curve("a", np.array([0.0, 1.0]), np.zeros(2))])
    assert zero.y_range[0] < 0 < zero.y_range[1]


@given(st.floats(-1e9, 1e9), st.floats(1e-3, 1e9))
def test_ticks_are_on_the_axis_in_order_and_all_different(low: float, span: float) -> None:
    chart = draw([Curve("a", np.array([0.0, 1.0]), np.array([low, low + max(span, abs(low) * 1e-3)]))])
    positions = [tick.at for tick in chart.y_ticks]
    assert 2 <= len(positions) <= 8
    assert all(-0.01 <= position <= 100.01 for position in positions)
    assert positions == sorted(positions)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.89928, "0.8993"), (31760.0, "31,760"), (12.34567, "12.35"), (1e-5, "1.00e-05"), (0.0, "0"), (math.nan, "–")],
)
def test_numbers_have_four_significant_digits(value: float, text: str) -> None:
    assert format_number(value) == text


def test_large_numbers_have_a_suffix() -> None:
    assert [format_compact(n) for n in (999, 1500, 31_760, 2_500_000, 3e9)] == ["999", "1.5k", "31.8k", "2.5M", "3G"]
