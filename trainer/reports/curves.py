"""Curves as shapes in a box of 1000 by 1000, which a page stretches to any width; texts stay outside of it.

Long curves are thinned by the least and the greatest value of every bucket, so that a spike stays visible.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trainer.reports.history import Floats

BOX = 1000.0
MOST_POINTS = 1000
NUM_TICKS = 6
HEADROOM = 0.04  # of a curve's range, left free above and below

Style = Literal["line", "dashed", "pale", "dotted", "area"]


@dataclass(frozen=True, eq=False)
class Curve:
    """y over x, both [N]; a y that is NaN is a gap. Curves of one colour belong together; None is a neutral one."""

    name: str
    x: Floats
    y: Floats
    colour: int | None = 0
    style: Style = "line"


@dataclass(frozen=True)
class Shape:
    """A curve as an SVG path, y downwards. `last` is its last figure."""

    name: str
    path: str
    colour: int | None
    style: Style
    last: str


@dataclass(frozen=True)
class Tick:
    """A place on an axis in per cent from its beginning, and what is written there."""

    at: float
    text: str


@dataclass(frozen=True)
class Chart:
    """Shapes with both axes; x_range and y_range end at the box's edges. marks: (place in per cent, kind, what)."""

    shapes: tuple[Shape, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    stacked: bool
    marks: tuple[tuple[float, str, str], ...] = ()


def thinned(y: Floats, most: int = MOST_POINTS) -> NDArray[np.int64]:
    """Indices of at most `most` points that keep the least and greatest value of each bucket, first and last point.

    A bucket that is all gap keeps one point of it, so that the gap stays.
    """
    if len(y) <= most:
        return np.arange(len(y))
    edges = np.linspace(0, len(y), most // 2, dtype=np.int64)  # one bucket fewer than half: room for both ends
    kept = {0, len(y) - 1}
    for begin, stop in pairwise(edges.tolist()):
        part = y[begin:stop]
        gap = np.isnan(part).all()
        kept |= {begin} if gap else {begin + int(np.nanargmin(part)), begin + int(np.nanargmax(part))}
    return np.array(sorted(kept))


def smoothed(y: Floats, window: int) -> Floats:
    """Mean over the `window` values around each one, fewer at the ends, gaps left out and kept as gaps."""
    known = ~np.isnan(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    begin = np.maximum(np.arange(len(y)) - window // 2, 0)
    stop = np.minimum(begin + window, len(y))
    num = counts[stop] - counts[begin]
    means: Floats = np.where(known, (sums[stop] - sums[begin]) / np.maximum(num, 1), np.nan)
    return means


def draw(
    curves: Sequence[Curve],
    *,
    y_range: tuple[float | None, float | None] = (None, None),
    stacked: bool = False,
    marks: Sequence[tuple[float, str, str]] = (),
    most: int = MOST_POINTS,
) -> Chart:
    """Curves on common axes. y_range fixes an end of the y axis where it is not None.

    stacked: each curve stands on the one before; they must share their x. marks are (x, kind, what happened).
    """
    ys = _stacked([curve.y for curve in curves]) if stacked else [curve.y for curve in curves]
    x_range = _range(np.concatenate([curve.x for curve in curves]), (None, None), 0.0)
    y_ends = _range(np.concatenate(ys), (0.0 if stacked else y_range[0], y_range[1]), HEADROOM)
    keep = _shared(ys, most) if stacked else None
    shapes = []
    for i, (curve, y) in enumerate(zip(curves, ys, strict=True)):
        at = thinned(y, most) if keep is None else keep
        top = _points(curve.x[at], y[at], x_range, y_ends)
        path = _dots(top) if curve.style == "dotted" else _line(top)
        if stacked:
            below = ys[i - 1][at] if i else np.where(np.isnan(y[at]), np.nan, 0.0)
            path = _area(top, _points(curve.x[at], below, x_range, y_ends))
        style: Style = "area" if stacked else curve.style
        shapes.append(Shape(curve.name, path, curve.colour, style, figure(_last(curve.y))))
    placed = tuple((100 * float(_scaled(x, x_range)), kind, text) for x, kind, text in marks)
    return Chart(tuple(shapes), _ticks(x_range), _ticks(y_ends), x_range, y_ends, stacked, placed)


def _stacked(ys: Sequence[Floats]) -> list[Floats]:
    """Running sums; where some of them have no figure the others stand on one another, all gaps stay a gap."""
    some = ~np.all(np.isnan(ys), axis=0)
    sums = np.cumsum([np.nan_to_num(y) for y in ys], axis=0)
    return [np.where(some, y, np.nan) for y in sums]


def _shared(ys: Sequence[Floats], most: int) -> NDArray[np.int64]:
    each = max(most // len(ys), 8)
    return np.unique(np.concatenate([thinned(y, each) for y in ys]))


def _range(values: Floats, fixed: tuple[float | None, float | None], headroom: float) -> tuple[float, float]:
    known = values[np.isfinite(values)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    room = headroom * (high - low)
    low = low - room if fixed[0] is None else fixed[0]
    high = high + room if fixed[1] is None else fixed[1]
    return (low, high) if high > low else (low - abs(low) * 0.01 - 1e-9, low + abs(low) * 0.01 + 1e-9)


def _scaled(value: float | Floats, ends: tuple[float, float]) -> float | Floats:
    return (value - ends[0]) / (ends[1] - ends[0])


Points = list[tuple[float, float] | None]


def _points(x: Floats, y: Floats, x_range: tuple[float, float], y_range: tuple[float, float]) -> Points:
    """Places in the box, y downwards; None where there is a gap."""
    columns = zip(np.atleast_1d(_scaled(x, x_range)), np.atleast_1d(_scaled(y, y_range)), strict=True)
    return [(BOX * float(a), BOX * (1 - float(b))) if math.isfinite(a + b) else None for a, b in columns]


def _runs(points: Points) -> list[list[tuple[float, float]]]:
    """Stretches without a gap."""
    runs: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if point is None:
            runs.append([])
        else:
            runs[-1].append(point)
    return [run for run in runs if run]


def _line(points: Points) -> str:
    """One M for each stretch; a single point is drawn as a dot by its round end."""
    return "".join(_path(run) + ("h0" if len(run) == 1 else "") for run in _runs(points))


def _dots(points: Points) -> str:
    return "".join(_path([point]) + "h0" for point in points if point is not None)


def _area(top: Points, bottom: Points) -> str:
    """Each stretch along its top and back along its bottom."""
    both = zip(_runs(top), _runs(bottom), strict=True)
    return "".join(_path(upper) + _path(lower[::-1]).replace("M", "L", 1) + "Z" for upper, lower in both)


def _path(run: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in run)


def _last(y: Floats) -> float:
    known = y[~np.isnan(y)]
    return float(known[-1]) if len(known) else math.nan


# --- axes and numbers ---


def _ticks(ends: tuple[float, float]) -> tuple[Tick, ...]:
    """Round numbers, about NUM_TICKS of them."""
    low, high = ends
    rough = (high - low) / NUM_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    decimals = max(0, -math.floor(math.log10(step)) + (step / power == 2.5))
    values = [(first + i) * step for i in range(count)]
    return tuple(Tick(100 * float(_scaled(value, ends)), _tick_text(value, decimals)) for value in values)


def _tick_text(value: float, decimals: int) -> str:
    if decimals > 4:
        return f"{value:.3g}"
    return f"{value:.{decimals}f}" if abs(value) < 10_000 else short(value)


def short(value: float) -> str:
    """A large number with k, M, G or T, at most three digits and no trailing zeros."""
    for power, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= power:
            return f"{value / power:.3g}{letter}"
    return f"{value:.3g}"


def figure(value: float | None) -> str:
    """A number for people: four digits that mean something; – where there is none."""
    if value is None or math.isnan(value):
        return "–"
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.4g}"
