"""Choose the charts of a report: which columns of a run are drawn, and which of its baseline.

A column that a run has not measured is left out. Columns that no chart names are drawn as small charts
(`other_charts`), so that a new metric appears in the report by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trainer.report.history import Floats, History
from trainer.report.summary import HELD_OUT_BPB
from trainer.report.svg import MAX_POINTS, Chart, Curve, Style, draw, moving_average

SMOOTHED_FROM_STEPS = 200  # shorter runs are drawn without smoothing
SMOOTHING_WINDOWS = 50  # the window of a moving average is the number of steps divided by this
MAX_OTHER_CHARTS = 60
OTHER_CHART_POINTS = 200
MAX_MARKERS = 200
TEACHERS = "Teachers over time"


@dataclass(frozen=True)
class Series:
    """A column of a run as one curve. A colour of None is a neutral one."""

    column: str
    name: str
    colour: int | None = 0
    style: Style = "line"
    table: Literal["steps", "evals"] = "steps"


@dataclass(frozen=True)
class ChartSpec:
    """One chart, before it is known which of its columns a run has.

    baseline_series  curves of the baseline
    smooth           whether long curves are drawn as moving averages
    markers          whether lost and joined teachers are marked
    """

    title: str
    unit: str
    series: Sequence[Series]
    baseline_series: Sequence[Series] = ()
    note: str = ""
    y_range: tuple[float | None, float | None] = (None, None)
    stacked: bool = False
    smooth: bool = False
    markers: bool = False
    wide: bool = False


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


# --- choice of charts ---


def chart_specs(run: History) -> dict[str, list[ChartSpec]]:
    """Return all charts by section of the report, in order."""
    return {
        "Loss and held-out text": _learning_charts(run),
        TEACHERS: _teacher_charts(run),
        "Rollouts": _rollout_charts(run),
        "Speed": _speed_charts(run),
        "Optimisation": _optimisation_charts(),
    }


def _learning_charts(run: History) -> list[ChartSpec]:
    held_out = Series(HELD_OUT_BPB, "student", table="evals")
    domains = sorted(name for name in run.evals.columns if name.startswith("held_out_domains/"))
    losses = [Series("cross_entropy", "cross-entropy", 1)]
    if "divergence" in run.steps.columns:
        losses = [Series("loss", "loss"), *losses, Series("divergence", "divergence", 2)]
    return [
        ChartSpec(
            "Held-out bits per byte",
            "bits per byte",
            [held_out],
            baseline_series=[Series(HELD_OUT_BPB, "baseline", table="evals")],
            wide=True,
        ),
        ChartSpec(
            "Training loss",
            "nats per token",
            losses,
            baseline_series=[Series("cross_entropy", "cross-entropy of the baseline")],
            smooth=True,
        ),
        ChartSpec(
            "Held-out bits per byte by domain",
            "bits per byte",
            [Series(name, name.partition("/")[2], i, table="evals") for i, name in enumerate(domains)],
        ),
        ChartSpec(
            "Top-1 agreement with the teachers on held-out text",
            "fraction of positions",
            _agreement_series(run, "top1"),
            y_range=(None, 1.0),
        ),
        ChartSpec(
            "KL(target ‖ student) on held-out text",
            "nats per token",
            _agreement_series(run, "kl"),
            y_range=(0.0, None),
        ),
    ]


def _agreement_series(run: History, key: str) -> list[Series]:
    """Return one series for each teacher and one for the fused target."""
    series = [Series(f"teachers/{name}/{key}", name, i, table="evals") for i, name in enumerate(run.teachers)]
    return [*series, Series(f"fused/{key}", "fused target", None, table="evals")]


def _per_teacher(run: History, key: str, label: str = "{}", style: Style = "line") -> list[Series]:
    """Return one series for each teacher, from its values in the step events."""
    return [Series(f"teachers/{name}/{key}", label.format(name), i, style) for i, name in enumerate(run.teachers)]


def _teacher_charts(run: History) -> list[ChartSpec]:
    bpb = _per_teacher(run, "aligned_bpb") + _per_teacher(run, "own_bpb", "{}, own tokens", "dashed")
    mass = [
        *_per_teacher(run, "mass"),
        Series("mass", "fused target", None),
        Series("coverage", "coverage", None, "dashed"),
    ]
    return [
        ChartSpec(
            "Weight of each teacher in the fused target",
            "weight",
            _per_teacher(run, "weight"),
            y_range=(0.0, 1.0),
            stacked=True,
            smooth=True,
            markers=True,
        ),
        ChartSpec(
            "Teachers on the training text",
            "bits per byte",
            bpb,
            note="Solid: aligned to the student's tokens. Dashed: on the teacher's own tokens.",
            smooth=True,
            markers=True,
        ),
        ChartSpec(
            "Listed mass and coverage",
            "fraction",
            mass,
            note="Listed mass: probability of the listed tokens, the rest is the tail. "
            "Coverage: fraction of positions that have a target.",
            y_range=(None, 1.0),
            smooth=True,
        ),
    ]


def _rollout_charts(run: History) -> list[ChartSpec]:
    bpb = [
        *_per_teacher(run, "rollout_bpb"),
        Series("rollouts/fused_bpb", "fused target", None),
        Series("rollouts/own_bpb", "student", None, "dashed"),
    ]
    nats = [
        Series("rollouts/entropy", "entropy"),
        Series("rollouts/cross_entropy", "cross-entropy", 1),
        Series("rollouts/divergence", "divergence", 2),
    ]
    fractions = [Series("rollouts/finished", "finished"), Series("rollouts/repetition", "repetition", 1)]
    lengths = [Series("rollouts/length", "tokens per rollout")]
    return [
        ChartSpec("Rollouts of the student", "bits per byte", bpb, smooth=True, markers=True, wide=True),
        ChartSpec("Student on its rollouts", "nats per token", nats, smooth=True),
        ChartSpec("Length of rollouts", "tokens", lengths, y_range=(0.0, None), smooth=True),
        ChartSpec("Finished rollouts, and repetition", "fraction", fractions, y_range=(0.0, 1.0), smooth=True),
        ChartSpec("Age of the weights that sampled", "steps", [Series("rollouts/age_steps", "mean")], smooth=True),
    ]


def _speed_charts(run: History) -> list[ChartSpec]:
    times = [
        Series("step_s", "step", 0),
        Series("wait_s", "wait for the batch", 1),
        Series("rollouts/sample_s", "sampling", 2),
    ]
    rates = [Series("tokens_per_s", "student", None), *_per_teacher(run, "tokens_per_s")]
    waits = _per_teacher(run, "wait_s")
    queued = [Series("queued_batches", "batches")]
    return [
        ChartSpec("Time per step", "seconds", times, stacked=True, markers=True),
        ChartSpec("Wait time by teacher", "seconds", waits, y_range=(0.0, None), smooth=True, markers=True),
        ChartSpec("Throughput", "tokens per second", rates, y_range=(0.0, None), smooth=True, markers=True),
        ChartSpec("Prefetched batches", "batches", queued, y_range=(0.0, None), smooth=True),
    ]


def _optimisation_charts() -> list[ChartSpec]:
    return [
        ChartSpec("Learning rate", "", [Series("lr", "learning rate")], y_range=(0.0, None)),
        ChartSpec("Gradient norm before clipping", "", [Series("grad_norm", "norm")], y_range=(0.0, None), smooth=True),
        ChartSpec("Weight of the cross-entropy", "", [Series("ce_weight", "λ")], y_range=(0.0, None)),
    ]


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
