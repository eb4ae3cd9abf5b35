"""Which figures a report has: what is drawn of a run, beside its twin, of everything that it may have measured."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trainer.reports.curves import MOST_POINTS, Chart, Curve, Style, draw, smoothed
from trainer.reports.history import Floats, History
from trainer.reports.summary import HELD_OUT

SMOOTH_FROM = 200  # steps from which on a noisy curve is drawn as a mean over 1/SMOOTH_SHARE of them
SMOOTH_SHARE = 50
MOST_FURTHER = 60
FURTHER_POINTS = 200
MOST_MARKS = 200


@dataclass(frozen=True)
class Line:
    """A column of a run as one curve. colour None is a neutral one."""

    column: str
    name: str
    colour: int | None = 0
    style: Style = "line"
    table: Literal["steps", "evals"] = "steps"


@dataclass(frozen=True)
class Plan:
    """One figure, before it is known which of its columns a run has; twins are the lines of the run beside it."""

    title: str
    unit: str
    lines: Sequence[Line]
    twins: Sequence[Line] = ()
    note: str = ""
    y_range: tuple[float | None, float | None] = (None, None)
    stacked: bool = False
    smooth: bool = False
    marks: bool = False
    wide: bool = False


@dataclass(frozen=True)
class Figure:
    """One figure, drawn."""

    title: str
    unit: str
    note: str
    chart: Chart
    wide: bool


@dataclass(frozen=True)
class Axis:
    """What all figures run along: tokens seen where every run has them, else steps."""

    unit: Literal["tokens", "steps"]

    def of(self, history: History, steps_N: NDArray[np.int64]) -> Floats:
        """[N] places of these steps."""
        tokens = history.tokens_at(steps_N) if self.unit == "tokens" else None
        return steps_N.astype(np.float64) if tokens is None else tokens


def axis_of(run: History, twin: History | None) -> Axis:
    """The axis that both have."""
    return Axis("tokens" if run.tokens is not None and (twin is None or twin.tokens is not None) else "steps")


# --- what is drawn ---


def plans(run: History) -> dict[str, list[Plan]]:
    """All figures by chapter, in order."""
    return {
        "Learning": _learning(run),
        "What the teachers said": _teaching(run),
        "Speed": _speed(run),
        "Optimisation": _optimising(),
    }


def _learning(run: History) -> list[Plan]:
    held_out = Line(HELD_OUT, "student", table="evals")
    domains = sorted(name for name in run.evals.columns if name.startswith("held_out_domains/"))
    losses = [Line("cross_entropy", "cross-entropy", 1)]
    if "divergence" in run.steps.columns:
        losses = [Line("loss", "loss"), *losses, Line("divergence", "divergence", 2)]
    return [
        Plan("Held-out bits per byte", "bits per byte", [held_out], [Line(HELD_OUT, "twin", table="evals")], wide=True),
        Plan("Training loss", "nats per token", losses, [Line("cross_entropy", "twin's cross-entropy")], smooth=True),
        Plan(
            "Held-out bits per byte by domain",
            "bits per byte",
            [Line(name, name.partition("/")[2], i, table="evals") for i, name in enumerate(domains)],
        ),
        Plan(
            "The student's likeliest token is the teacher's, on held-out text",
            "share of positions",
            _agreeing(run, "top1"),
            y_range=(None, 1.0),
        ),
        Plan("KL(target ‖ student) on held-out text", "nats per token", _agreeing(run, "kl"), y_range=(0.0, None)),
    ]


def _agreeing(run: History, key: str) -> list[Line]:
    """With each teacher and with their fusion."""
    each = [Line(f"teachers/{name}/{key}", name, i, table="evals") for i, name in enumerate(run.teachers)]
    return [*each, Line(f"fused/{key}", "fused", None, table="evals")]


def _teaching(run: History) -> list[Plan]:
    def each(key: str, name: str = "{}", style: Style = "line") -> list[Line]:
        return [Line(f"teachers/{t}/{key}", name.format(t), i, style) for i, t in enumerate(run.teachers)]

    both_bpb = each("aligned_bpb") + each("own_bpb", "{}, own tokens", "dashed")
    mass = [*each("mass"), Line("mass", "fused", None), Line("coverage", "coverage", None, "dashed")]
    return [
        Plan(
            "Share of each teacher in the fused target",
            "share",
            each("share"),
            y_range=(0.0, 1.0),
            stacked=True,
            smooth=True,
            marks=True,
        ),
        Plan(
            "Teachers on the training text",
            "bits per byte",
            both_bpb,
            note="Solid: aligned to the student's tokens; dashed: on the teacher's own.",
            smooth=True,
            marks=True,
        ),
        Plan(
            "Listed mass, and coverage",
            "share",
            mass,
            note="Mass: probability on listed tokens, the rest is tail. Coverage: positions that have a target.",
            y_range=(None, 1.0),
            smooth=True,
        ),
    ]


def _speed(run: History) -> list[Plan]:
    def each(key: str) -> list[Line]:
        return [Line(f"teachers/{t}/{key}", t, i) for i, t in enumerate(run.teachers)]

    spent = [Line("step_s", "student's step", 0), Line("waited_s", "waited for targets", 1)]
    rates = [Line("tokens_per_s", "student", None), *each("tokens_per_s")]
    return [
        Plan("Time per step", "seconds", spent, stacked=True, marks=True),
        Plan("Waited for each teacher", "seconds", each("waited_s"), y_range=(0.0, None), smooth=True, marks=True),
        Plan("Throughput", "tokens per second", rates, y_range=(0.0, None), smooth=True, marks=True),
        Plan("Batches ready ahead", "batches", [Line("queued_batches", "queued")], y_range=(0.0, None), smooth=True),
    ]


def _optimising() -> list[Plan]:
    return [
        Plan("Learning rate", "", [Line("lr", "learning rate")], y_range=(0.0, None)),
        Plan("Gradient norm before clipping", "", [Line("grad_norm", "norm")], y_range=(0.0, None), smooth=True),
        Plan("Weight of the cross-entropy", "", [Line("ce_weight", "λ")], y_range=(0.0, None)),
    ]


def further(run: History, known: set[str], axis: Axis) -> tuple[list[Figure], dict[str, float]]:
    """Everything else that was measured at steps: what moves as small figures, what does not by its value."""
    moving: list[Plan] = []
    constant: dict[str, float] = {}
    for name in sorted(run.steps.columns.keys() - known):
        column = run.steps.get(name)
        if column is None:
            continue
        low, high = float(np.nanmin(column)), float(np.nanmax(column))
        if low == high:
            constant[name] = low
        elif len(moving) < MOST_FURTHER:
            moving.append(Plan(name, "", [Line(name, name)]))
    drawn = [draw_plan(plan, run, None, axis, most=FURTHER_POINTS) for plan in moving]
    return [one for one in drawn if one is not None], constant


# --- drawing ---


def draw_plan(plan: Plan, run: History, twin: History | None, axis: Axis, *, most: int = MOST_POINTS) -> Figure | None:
    """The figure of those columns that the run has; None if it has none of them."""
    window = len(run.steps) // SMOOTH_SHARE if plan.smooth and len(run.steps) >= SMOOTH_FROM else 1
    curves = [curve for line in plan.lines for curve in _curves(line, run, axis, plan, window)]
    if not curves:
        return None
    if twin is not None:
        beside = [replace(line, colour=None, style="dashed") for line in plan.twins]
        curves += [curve for line in beside for curve in _curves(line, twin, axis, plan, window)]
    marks = []
    if plan.marks:
        seen = run.marks[:MOST_MARKS]
        places = axis.of(run, np.array([mark.step for mark in seen], np.int64)).tolist()
        marks = [(x, m.kind, f"{m.teacher}: {said(m.kind)}") for x, m in zip(places, seen, strict=True)]
    chart = draw(curves, y_range=plan.y_range, stacked=plan.stacked, marks=marks, most=most)
    note = f"{plan.note} Lines are means over {window} steps." if window > 1 else plan.note
    return Figure(plan.title, plan.unit, note.strip(), chart, plan.wide)


def _curves(line: Line, history: History, axis: Axis, plan: Plan, window: int) -> list[Curve]:
    """The line, over its pale self where it is smoothed, and with a dot for each measurement on held-out text."""
    table = history.steps if line.table == "steps" else history.evals
    y = table.get(line.column)
    if y is None:
        return []
    curve = Curve(line.name, axis.of(history, table.steps), y, line.colour, line.style)
    if line.table == "evals":
        return [curve, replace(curve, style="dotted")]
    if window == 1:
        return [curve]
    mean = replace(curve, y=smoothed(y, window))
    return [mean] if plan.stacked or line.style != "line" else [replace(curve, style="pale"), mean]


def said(kind: str) -> str:
    """What happened to a teacher, from the event's name."""
    return kind.removeprefix("teacher_")
