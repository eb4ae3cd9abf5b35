"""Draw the charts of a report, which chart_specs.py chooses.

A column that a run has not measured is left out. Columns that no chart names are drawn as small charts
(`other_charts`), so that a new metric appears in the report by itself.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trainer.report.chart_specs import ChartSpec, Series
from trainer.report.history import Floats, History
from trainer.report.svg import MAX_POINTS, Chart, Curve, draw, moving_average

SMOOTHED_FROM_STEPS = 200  # shorter runs are drawn without smoothing
SMOOTHING_WINDOWS = 50  # the window of a moving average is the number of steps divided by this
MAX_OTHER_CHARTS = 60
OTHER_CHART_POINTS = 200
MAX_MARKERS = 200


@dataclass(frozen=True)
class Figure:
    """A drawn chart with its title and caption."""

    title: str
    unit: str
    note: str
    chart: Chart
    wide: bool


@dataclass(frozen=True)
class XAxis:
    """The x axis of all charts: tokens seen if all runs have them, else steps."""

    unit: Literal["tokens", "steps"]

    def values(self, history: History, steps_N: NDArray[np.int64]) -> Floats:
        """Return the x values [N] of these steps."""
        tokens = history.tokens_at(steps_N) if self.unit == "tokens" else None
        return steps_N.astype(np.float64) if tokens is None else tokens


def common_x_axis(run: History, baseline: History | None) -> XAxis:
    """Return the x axis that both runs have."""
    has_tokens = run.tokens is not None and (baseline is None or baseline.tokens is not None)
    return XAxis("tokens" if has_tokens else "steps")


def other_charts(run: History, drawn: set[str], axis: XAxis) -> tuple[list[Figure], dict[str, float]]:
    """Return small charts of the step columns that are not drawn yet, and the values of the constant ones."""
    specs: list[ChartSpec] = []
    constants: dict[str, float] = {}
    for name in sorted(run.steps.columns.keys() - drawn):
        column = run.steps.get(name)
        if column is None:
            continue
        low, high = float(np.nanmin(column)), float(np.nanmax(column))
        if low == high:
            constants[name] = low
        elif len(specs) < MAX_OTHER_CHARTS:
            specs.append(ChartSpec(name, "", [Series(name, name)]))
    figures = [draw_chart(spec, run, None, axis, max_points=OTHER_CHART_POINTS) for spec in specs]
    return [figure for figure in figures if figure is not None], constants


# --- drawing ---


def draw_chart(
    spec: ChartSpec, run: History, baseline: History | None, axis: XAxis, *, max_points: int = MAX_POINTS
) -> Figure | None:
    """Draw the columns of a chart that the run has. Return None if it has none of them."""
    smooth = spec.smooth and len(run.steps) >= SMOOTHED_FROM_STEPS
    window = len(run.steps) // SMOOTHING_WINDOWS if smooth else 1
    curves = [curve for series in spec.series for curve in _curves(series, run, axis, spec, window)]
    if not curves:
        return None
    if baseline is not None:
        neutral = [replace(series, colour=None, style="dashed") for series in spec.baseline_series]
        curves += [curve for series in neutral for curve in _curves(series, baseline, axis, spec, window)]
    chart = draw(
        curves,
        y_range=spec.y_range,
        stacked=spec.stacked,
        markers=_markers(run, axis) if spec.markers else (),
        max_points=max_points,
    )
    note = f"{spec.note} Lines are means over {window} steps." if window > 1 else spec.note
    return Figure(spec.title, spec.unit, note.strip(), chart, spec.wide)


def _markers(run: History, axis: XAxis) -> list[tuple[float, str, str]]:
    changes = run.teacher_changes[:MAX_MARKERS]
    x_N = axis.values(run, np.array([change.step for change in changes], np.int64)).tolist()
    return [
        (x, change.kind, f"{change.teacher}: {change_label(change.kind)}")
        for x, change in zip(x_N, changes, strict=True)
    ]


def change_label(kind: str) -> str:
    """Return what happened to a teacher, from the name of its event: "lost" for teacher_lost."""
    return kind.removeprefix("teacher_")


def _curves(series: Series, history: History, axis: XAxis, spec: ChartSpec, window: int) -> list[Curve]:
    """Return the curves of one series, in drawing order.

    An evaluation curve gets a dot for each measurement. A smoothed line is drawn over its raw values in a pale colour.
    """
    table = history.steps if series.table == "steps" else history.evals
    y = table.get(series.column)
    if y is None:
        return []
    curve = Curve(series.name, axis.values(history, table.steps), y, series.colour, series.style)
    if series.table == "evals":
        return [curve, replace(curve, style="dotted")]
    if window == 1:
        return [curve]
    mean = replace(curve, y=moving_average(y, window))
    return [mean] if spec.stacked or series.style != "line" else [replace(curve, style="pale"), mean]
