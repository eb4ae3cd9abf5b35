"""Draw curves as SVG paths in a box of 1000 by 1000 units, which a page stretches to any size.

Texts (ticks, legends) are not part of the SVG, so that stretching does not distort them. Long curves are downsampled
by the minimum and the maximum of each bucket: a spike of one step stays visible.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trainer.report.formatting import format_compact, format_number
from trainer.report.history import Floats

BOX = 1000.0
MAX_POINTS = 1000
NUM_TICKS = 6
HEADROOM = 0.04  # fraction of the y range that is left free above and below

Style = Literal["line", "dashed", "pale", "dotted", "area"]
Range = tuple[float, float]
Points = list[tuple[float, float] | None]  # None is a gap


@dataclass(frozen=True, eq=False)
class Curve:
    """y over x, both [N]; NaN in y is a gap. Curves of one colour belong together; None is a neutral colour."""

    name: str
    x: Floats
    y: Floats
    colour: int | None = 0
    style: Style = "line"


@dataclass(frozen=True)
class Shape:
    """A curve as an SVG path, y axis downwards. `last` is the last value as text."""

    name: str
    path: str
    colour: int | None
    style: Style
    last: str


@dataclass(frozen=True)
class Tick:
    """A tick of an axis: its position in percent of the axis and its text."""

    at: float
    text: str


@dataclass(frozen=True)
class Marker:
    """A vertical line at a position in percent of the x axis. `kind` is a CSS class, `text` a tooltip."""

    at: float
    kind: str
    text: str


@dataclass(frozen=True)
class Chart:
    """Shapes on common axes. x_range and y_range are the values at the edges of the box."""

    shapes: tuple[Shape, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    x_range: Range
    y_range: Range
    stacked: bool
    markers: tuple[Marker, ...] = ()


def downsample(y: Floats, max_points: int = MAX_POINTS) -> NDArray[np.int64]:
    """Return at most `max_points` indices: first, last, and the minimum and the maximum of each bucket.

    A bucket without any number keeps one NaN, so that the gap stays visible.
    """
    if len(y) <= max_points:
        return np.arange(len(y))
    edges = np.linspace(0, len(y), max_points // 2, dtype=np.int64)  # max_points // 2 − 1 buckets, plus both ends
    kept = {0, len(y) - 1}
    for begin, end in pairwise(edges.tolist()):
        bucket = y[begin:end]
        if np.isnan(bucket).all():
            kept.add(begin)
        else:
            kept |= {begin + int(np.nanargmin(bucket)), begin + int(np.nanargmax(bucket))}
    return np.array(sorted(kept))


def moving_average(y: Floats, window: int) -> Floats:
    """Return the mean of the `window` values around each value, fewer at the ends. NaN is ignored and stays NaN."""
    known = ~np.isnan(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    begin = np.maximum(np.arange(len(y)) - window // 2, 0)
    end = np.minimum(begin + window, len(y))
    num_known = counts[end] - counts[begin]
    means: Floats = np.where(known, (sums[end] - sums[begin]) / np.maximum(num_known, 1), np.nan)
    return means


def draw(
    curves: Sequence[Curve],
    *,
    y_range: tuple[float | None, float | None] = (None, None),
    stacked: bool = False,
    markers: Sequence[tuple[float, str, str]] = (),
    max_points: int = MAX_POINTS,
) -> Chart:
    """Draw curves on common axes.

    y_range     fixes an end of the y axis where it is not None
    stacked     draws each curve as an area on top of the previous one; the curves must have the same x
    markers     vertical lines as (x, kind, text)
    max_points  maximum number of points per curve
    """
    ys = _stack([curve.y for curve in curves]) if stacked else [curve.y for curve in curves]
    x_range = _axis_range(np.concatenate([curve.x for curve in curves]), (None, None), 0.0)
    fixed = (0.0 if stacked else y_range[0], y_range[1])
    y_ends = _axis_range(np.concatenate(ys), fixed, HEADROOM)
    common = _common_indices(ys, max_points) if stacked else None
    shapes = []
    for i, (curve, y) in enumerate(zip(curves, ys, strict=True)):
        kept = downsample(y, max_points) if common is None else common
        points = _points(curve.x[kept], y[kept], x_range, y_ends)
        path = _dots(points) if curve.style == "dotted" else _line(points)
        if stacked:
            below = ys[i - 1][kept] if i else np.where(np.isnan(y[kept]), np.nan, 0.0)
            path = _area(points, _points(curve.x[kept], below, x_range, y_ends))
        style: Style = "area" if stacked else curve.style
        shapes.append(Shape(curve.name, path, curve.colour, style, format_number(_last_value(curve.y))))
    placed = tuple(Marker(100 * float(_fraction(x, x_range)), kind, text) for x, kind, text in markers)
    return Chart(tuple(shapes), _ticks(x_range), _ticks(y_ends), x_range, y_ends, stacked, placed)


def _stack(ys: Sequence[Floats]) -> list[Floats]:
    """Return running sums. A missing value counts as 0 unless all curves are missing there, which stays a gap."""
    any_known = ~np.all(np.isnan(ys), axis=0)
    sums = np.cumsum([np.nan_to_num(y) for y in ys], axis=0)
    return [np.where(any_known, y, np.nan) for y in sums]


def _common_indices(ys: Sequence[Floats], max_points: int) -> NDArray[np.int64]:
    """Return the indices that stacked areas share, so that the edges of neighbours coincide."""
    points_per_curve = max(max_points // len(ys), 8)
    return np.unique(np.concatenate([downsample(y, points_per_curve) for y in ys]))


def _axis_range(values: Floats, fixed: tuple[float | None, float | None], headroom: float) -> Range:
    known = values[np.isfinite(values)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    margin = headroom * (high - low)
    low = low - margin if fixed[0] is None else fixed[0]
    high = high + margin if fixed[1] is None else fixed[1]
    return (low, high) if high > low else (low - abs(low) * 0.01 - 1e-9, low + abs(low) * 0.01 + 1e-9)


def _fraction(value: float | Floats, ends: Range) -> float | Floats:
    """Return the position on an axis: 0 at its begin, 1 at its end."""
    return (value - ends[0]) / (ends[1] - ends[0])


def _points(x: Floats, y: Floats, x_range: Range, y_range: Range) -> Points:
    """Return positions in the box, y axis downwards; None for a gap."""
    pairs = zip(np.atleast_1d(_fraction(x, x_range)), np.atleast_1d(_fraction(y, y_range)), strict=True)
    return [(BOX * float(a), BOX * (1 - float(b))) if math.isfinite(a + b) else None for a, b in pairs]


def _segments(points: Points) -> list[list[tuple[float, float]]]:
    """Split points at the gaps."""
    segments: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if point is None:
            segments.append([])
        else:
            segments[-1].append(point)
    return [segment for segment in segments if segment]


def _line(points: Points) -> str:
    """Return one subpath for each segment. A line of length 0 (h0) with round ends shows a single point as a dot."""
    return "".join(_path(segment) + ("h0" if len(segment) == 1 else "") for segment in _segments(points))


def _dots(points: Points) -> str:
    return "".join(_path([point]) + "h0" for point in points if point is not None)


def _area(top: Points, bottom: Points) -> str:
    """Return one closed subpath for each segment: along its top and back along its bottom."""
    pairs = zip(_segments(top), _segments(bottom), strict=True)
    return "".join(_path(upper) + _path(lower[::-1]).replace("M", "L", 1) + "Z" for upper, lower in pairs)


def _path(segment: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in segment)


def _last_value(y: Floats) -> float:
    known = y[~np.isnan(y)]
    return float(known[-1]) if len(known) else math.nan


def _ticks(ends: Range) -> tuple[Tick, ...]:
    """Return about NUM_TICKS ticks at multiples of 1, 2, 2.5 or 5 times a power of ten."""
    low, high = ends
    rough = (high - low) / NUM_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    decimals = max(0, -math.floor(math.log10(step)) + (step / power == 2.5))
    values = [(first + i) * step for i in range(count)]
    return tuple(Tick(100 * float(_fraction(value, ends)), _tick_text(value, decimals)) for value in values)


def _tick_text(value: float, decimals: int) -> str:
    if decimals > 4:
        return f"{value:.3g}"
    return f"{value:.{decimals}f}" if abs(value) < 10_000 else format_compact(value)
