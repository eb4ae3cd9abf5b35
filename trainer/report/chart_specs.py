"""Choose the charts of a report: the columns of a run that are drawn, and those of its baseline.

A column that a run has not measured is left out by charts.py, which draws the charts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trainer.report.history import History
from trainer.report.summary import HELD_OUT_BPB
from trainer.report.svg import Style

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
