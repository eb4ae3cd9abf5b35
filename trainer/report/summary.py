"""Summarise a run in numbers and in one sentence: before, best, last, and compared with its baseline."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.report.formatting import format_number
from trainer.report.history import Floats, History

HELD_OUT_BPB = "held_out_bpb"
START_TOLERANCE = 1e-3  # relative; another device or precision changes bits per byte in the third digit at most
EXPECTED_DIFFERENCES = ("teachers", "fusion", "loss", "rollout", "output", "tracking")
"""Sections of the run file in which a run and its baseline differ by design."""


@dataclass(frozen=True)
class HeldOut:
    """Bits per byte of held-out text. `before` is None if it was not measured before the first step."""

    before: float | None
    best: float
    best_step: int
    best_tokens: int | None
    last: float
    last_step: int


@dataclass(frozen=True)
class TeacherSummary:
    """Means over the steps, weighted by their tokens; None where nothing was measured."""

    weight: float | None
    mass: float | None
    own_bpb: float | None
    aligned_bpb: float | None
    num_lost: int


@dataclass(frozen=True)
class Summary:
    """One run. `tokens` is None if the file does not hold every step; `seconds` is the sum of step and wait times."""

    folder: str
    steps: int
    planned_steps: int | None
    finished: bool
    num_starts: int
    tokens: int | None
    seconds: float | None
    wait_fraction: float | None
    tokens_per_s: float | None
    first_loss: float | None
    last_loss: float | None
    held_out: HeldOut | None
    teachers: dict[str, TeacherSummary]


@dataclass(frozen=True)
class TokensToBpb:
    """Tokens until a run first measured at most `bpb`, a value that its baseline had after `baseline_tokens`.

    tokens is None if the run never measured it. ratio is tokens / baseline_tokens; FuseLLM (arXiv 2401.10491) reports
    1/3.9.
    """

    bpb: float
    tokens: int | None
    baseline_tokens: int
    ratio: float | None


@dataclass(frozen=True)
class Comparison:
    """A run compared with its baseline.

    same_start     whether both had the same bits per byte before the first step: same student, same text
    baseline_best  tokens until the run was as good as the baseline's best value
    baseline_last  the same for the baseline's last value; None if the baseline ended no better than it started
    differs_in     other keys of the run file in which both differ, with the values of the run and of the baseline
    """

    baseline: Summary
    same_start: bool
    baseline_best: TokensToBpb | None
    baseline_last: TokensToBpb | None
    differs_in: dict[str, tuple[Any, Any]]


def summarise(history: History) -> Summary:
    """Return the summary of one run."""
    steps, tokens = history.steps, history.tokens
    step_s, wait_s = steps.get("step_s"), steps.get("wait_s")
    seconds = float(np.nansum(step_s) + np.nansum(wait_s)) if step_s is not None and wait_s is not None else None
    step_tokens = steps.get("tokens")
    loss = steps.get("loss")
    planned = history.start.get("steps")
    return Summary(
        folder=str(history.folder),
        steps=int(steps.steps[-1]) if len(steps) else 0,
        planned_steps=planned if isinstance(planned, int) else None,
        finished=history.finished,
        num_starts=history.num_starts,
        tokens=None if tokens is None else int(tokens[-1]),
        seconds=seconds,
        wait_fraction=float(np.nansum(wait_s)) / seconds if seconds and wait_s is not None else None,
        tokens_per_s=float(np.nansum(step_tokens)) / seconds if seconds and step_tokens is not None else None,
        first_loss=_known_value(loss, 0),
        last_loss=_known_value(loss, -1),
        held_out=_held_out(history),
        teachers={name: _teacher_summary(history, name) for name in history.teachers},
    )


def _known_value(column: Floats | None, index: int) -> float | None:
    """Return the first (index 0) or last (index −1) number of a column."""
    return None if column is None else float(column[~np.isnan(column)][index])


def held_out_curve(history: History) -> tuple[NDArray[np.int64], Floats] | None:
    """Return the steps and bits per byte of all evaluations on held-out text; None if there are none."""
    bpb = history.evals.get(HELD_OUT_BPB)
    if bpb is None:
        return None
    known = ~np.isnan(bpb)
    return history.evals.steps[known], bpb[known]


def _held_out(history: History) -> HeldOut | None:
    curve = held_out_curve(history)
    if curve is None:
        return None
    steps, bpb = curve
    best = int(np.argmin(bpb))
    tokens = history.tokens_at(steps)
    return HeldOut(
        before=float(bpb[0]) if steps[0] == 0 else None,
        best=float(bpb[best]),
        best_step=int(steps[best]),
        best_tokens=None if tokens is None else int(tokens[best]),
        last=float(bpb[-1]),
        last_step=int(steps[-1]),
    )


def _teacher_summary(history: History, name: str) -> TeacherSummary:
    tokens = history.steps.get("tokens")

    def mean(key: str) -> float | None:
        column = history.steps.get(f"teachers/{name}/{key}")
        if column is None:
            return None
        weights = np.where(np.isnan(column), 0.0, 1.0 if tokens is None else np.nan_to_num(tokens))
        return float(np.nansum(column * weights) / weights.sum()) if weights.sum() > 0 else None

    num_lost = sum(change.kind == "teacher_lost" and change.teacher == name for change in history.teacher_changes)
    return TeacherSummary(
        weight=mean("weight"),
        mass=mean("mass"),
        own_bpb=mean("own_bpb"),
        aligned_bpb=mean("aligned_bpb"),
        num_lost=num_lost,
    )


def compare(history: History, baseline: History) -> Comparison:
    """Compare a run with its baseline: tokens until it was as good, and unexpected differences in the run file."""
    ours, baseline_summary = summarise(history).held_out, summarise(baseline)
    reference = baseline_summary.held_out
    best = last = None
    same_start = False
    if ours is not None and reference is not None:
        same_start = _is_same_start(ours, reference)
        best = _tokens_to_bpb(history, baseline, reference.best, reference.best_step)
        if reference.before is not None and reference.last < reference.before:
            last = _tokens_to_bpb(history, baseline, reference.last, reference.last_step)
    return Comparison(baseline_summary, same_start, best, last, _differences(history.config, baseline.config))


def _is_same_start(ours: HeldOut, reference: HeldOut) -> bool:
    if ours.before is None or reference.before is None:
        return True
    return math.isclose(ours.before, reference.before, rel_tol=START_TOLERANCE)


def _tokens_to_bpb(history: History, baseline: History, bpb: float, baseline_step: int) -> TokensToBpb | None:
    """Return the tokens until `bpb`, which the baseline had at `baseline_step`; None if token counts are missing."""
    curve, baseline_tokens = held_out_curve(history), baseline.tokens_at(np.array([baseline_step]))
    tokens = None if curve is None else history.tokens_at(curve[0])
    if curve is None or tokens is None or baseline_tokens is None:
        return None
    reached = np.flatnonzero(curve[1] <= bpb)
    needed, reference = int(tokens[reached[0]]) if len(reached) else None, int(baseline_tokens[0])
    return TokensToBpb(bpb, needed, reference, None if needed is None or not reference else needed / reference)


def _differences(run: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the keys in which two run files differ, outside the sections that differ by design."""
    differences = {}
    for section in sorted((run.keys() & baseline.keys()) - set(EXPECTED_DIFFERENCES)):
        ours, theirs = run[section], baseline[section]
        for key in sorted(ours.keys() & theirs.keys()):
            if ours[key] != theirs[key]:
                differences[f"{section}.{key}"] = (ours[key], theirs[key])
    return differences


def sentence(summary: Summary, comparison: Comparison | None) -> str:
    """Describe the result of a run with its numbers, and name missing measurements."""
    held_out = summary.held_out
    incomplete = not summary.finished and summary.planned_steps
    done = f"After {summary.steps:,}" + (f" of {summary.planned_steps:,} planned steps" if incomplete else " steps")
    if summary.tokens is not None:
        done += f" and {summary.tokens:,} tokens"
    if not summary.finished and not summary.planned_steps:
        done += " so far"
    if held_out is None:
        return (
            f"{done} the training loss is {format_number(summary.last_loss)} nats per token, "
            f"from {format_number(summary.first_loss)} at the first step; no held-out text was measured."
        )
    text = f"{done} the student has {format_number(held_out.last)} bits per byte of held-out text"
    if held_out.before is not None:
        text += f", from {format_number(held_out.before)} before training"
    if held_out.best_step != held_out.last_step:
        text += f"; its best value, {format_number(held_out.best)}, was after step {held_out.best_step:,}"
    return f"{text}. {_comparison_sentence(comparison)}".rstrip()


def _comparison_sentence(comparison: Comparison | None) -> str:
    if comparison is None or comparison.baseline.held_out is None:
        return ""
    held_out = comparison.baseline.held_out
    name = "baseline" if comparison.baseline.teachers else "baseline without teachers"
    text = f"The {name} has {format_number(held_out.last)}"
    if held_out.best_step != held_out.last_step:
        text += f", with {format_number(held_out.best)} as its best value"
    if not comparison.same_start:
        return (
            f"{text}, but started at {format_number(held_out.before)}: the two runs do not have the same student and "
            "held-out text."
        )
    reached, which = comparison.baseline_last, "last"
    if comparison.baseline_best is not None and (reached is None or held_out.best_step != held_out.last_step):
        reached, which = comparison.baseline_best, "best"
    if reached is None:
        return f"{text}."
    if reached.tokens is None:
        return f"{text}; the student has not reached the baseline's {which} value."
    ratio = "" if reached.ratio is None else f" (ratio {reached.ratio:.2f})"
    return (
        f"{text}. The student reached the baseline's {which} value within {reached.tokens:,} tokens, "
        f"the baseline within {reached.baseline_tokens:,}{ratio}."
    )
