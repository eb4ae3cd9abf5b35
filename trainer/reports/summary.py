"""What came of a run, in figures and in one sentence: before, best, last, and against its twin."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.reports.curves import figure
from trainer.reports.history import Floats, History

HELD_OUT = "held_out_bpb"


@dataclass(frozen=True)
class HeldOut:
    """Bits per byte of held-out text; `before` is None where it was not measured before the first step."""

    before: float | None
    best: float
    best_step: int
    best_tokens: int | None
    last: float
    last_step: int


@dataclass(frozen=True)
class TeacherFigures:
    """Means over the steps, each step counting by its tokens; None where nothing was measured."""

    share: float | None
    mass: float | None
    own_bpb: float | None
    aligned_bpb: float | None
    num_lost: int


@dataclass(frozen=True)
class Summary:
    """One run. tokens are None where the file does not hold every step; seconds are steps and waiting, summed."""

    folder: str
    steps: int
    planned_steps: int | None
    finished: bool
    num_starts: int
    tokens: int | None
    seconds: float | None
    waited_share: float | None
    tokens_per_s: float | None
    first_loss: float | None
    last_loss: float | None
    held_out: HeldOut | None
    teachers: dict[str, TeacherFigures]


@dataclass(frozen=True)
class Reached:
    """When a run first measured at most `bpb`, which its twin had after twin_tokens. tokens: None if it never did.

    ratio is tokens / twin_tokens: FuseLLM's (arXiv 2401.10491) is 1/3.9.
    """

    bpb: float
    tokens: int | None
    twin_tokens: int
    ratio: float | None


@dataclass(frozen=True)
class Comparison:
    """A run beside its twin.

    same_start  whether both were measured alike before the first step, so to the same student on the same text
    twins_last  None where the twin ended no better than it began: that is no goal
    differs_in  other keys of the run file in which they differ, with both values
    """

    twin: Summary
    same_start: bool
    twins_best: Reached | None
    twins_last: Reached | None
    differs_in: dict[str, tuple[Any, Any]]


def summarise(history: History) -> Summary:
    """The figures of one run."""
    steps, tokens = history.steps, history.tokens
    step_s, waited_s = steps.get("step_s"), steps.get("waited_s")
    seconds = float(np.nansum(step_s) + np.nansum(waited_s)) if step_s is not None and waited_s is not None else None
    done = steps.get("tokens")
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
        waited_share=float(np.nansum(waited_s)) / seconds if seconds and waited_s is not None else None,
        tokens_per_s=float(np.nansum(done)) / seconds if seconds and done is not None else None,
        first_loss=_known(loss, 0),
        last_loss=_known(loss, -1),
        held_out=_held_out(history),
        teachers={name: _teacher(history, name) for name in history.teachers},
    )


def _known(column: Floats | None, place: int) -> float | None:
    """The first (0) or last (−1) figure of a column."""
    return None if column is None else float(column[~np.isnan(column)][place])


def measured(history: History) -> tuple[NDArray[np.int64], Floats] | None:
    """Steps and held-out bits per byte, None if there are none."""
    bpb = history.evals.get(HELD_OUT)
    if bpb is None:
        return None
    known = ~np.isnan(bpb)
    return history.evals.steps[known], bpb[known]


def _held_out(history: History) -> HeldOut | None:
    found = measured(history)
    if found is None:
        return None
    steps, bpb = found
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


def _teacher(history: History, name: str) -> TeacherFigures:
    weights = history.steps.get("tokens")

    def mean(key: str) -> float | None:
        column = history.steps.get(f"teachers/{name}/{key}")
        if column is None:
            return None
        weight = np.where(np.isnan(column), 0.0, 1.0 if weights is None else np.nan_to_num(weights))
        return float(np.nansum(column * weight) / weight.sum()) if weight.sum() > 0 else None

    num_lost = sum(mark.kind == "teacher_lost" and mark.teacher == name for mark in history.marks)
    return TeacherFigures(mean("share"), mean("mass"), mean("own_bpb"), mean("aligned_bpb"), num_lost)


def compare(history: History, twin: History) -> Comparison:
    """The run beside its twin: tokens until it was as good, and what else is different between the two."""
    ours, theirs = summarise(history).held_out, summarise(twin)
    reference = theirs.held_out
    best = last = None
    same_start = False
    if ours is not None and reference is not None:
        same_start = ours.before is None or reference.before is None or _alike(ours.before, reference.before)
        best = _reached(history, twin, reference.best, reference.best_step)
        if reference.before is not None and reference.last < reference.before:
            last = _reached(history, twin, reference.last, reference.last_step)
    return Comparison(theirs, same_start, best, last, _differences(history.run, twin.run))


def _alike(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-3)  # another device or precision moves the third digit at most


def _reached(history: History, twin: History, bpb: float, step: int) -> Reached | None:
    found, spent = measured(history), twin.tokens_at(np.array([step]))
    if found is None or spent is None or history.tokens is None:
        return None
    at = np.flatnonzero(found[1] <= bpb)
    tokens = history.tokens_at(found[0])
    first = int(tokens[at[0]]) if tokens is not None and len(at) else None
    return Reached(bpb, first, int(spent[0]), None if first is None or not spent[0] else first / float(spent[0]))


def _differences(run: Any, twin: Any) -> dict[str, tuple[Any, Any]]:
    """Keys of the run file in which the two differ, beside teaching itself and where they write."""
    meant = ("teachers", "fusion", "loss", "output", "tracking")
    found = {}
    for section in sorted((run.keys() & twin.keys()) - set(meant)):
        one, other = run[section], twin[section]
        for key in sorted(one.keys() & other.keys()):
            if one[key] != other[key]:
                found[f"{section}.{key}"] = (one[key], other[key])
    return found


def sentence(summary: Summary, comparison: Comparison | None) -> str:
    """The result with its numbers, for people. Says what was not measured instead of leaving it out."""
    held_out = summary.held_out
    done = f"{summary.steps:,} steps" + (f" and {summary.tokens:,} tokens" if summary.tokens is not None else "")
    so_far = (
        "" if summary.finished else f" of {summary.planned_steps:,} planned" if summary.planned_steps else " so far"
    )
    if held_out is None:
        return f"After {done}{so_far} the training loss is {figure(summary.last_loss)} nats per token, \
from {figure(summary.first_loss)} at the first step; no held-out text was measured."
    before = "" if held_out.before is None else f", from {figure(held_out.before)} before training"
    text = f"After {done}{so_far} the student pays {figure(held_out.last)} bits per byte of held-out text{before}"
    if held_out.best_step != held_out.last_step:
        text += f"; its best, {figure(held_out.best)}, was after step {held_out.best_step:,}"
    return f"{text}. {_beside(comparison)}".rstrip()


def _beside(comparison: Comparison | None) -> str:
    if comparison is None or comparison.twin.held_out is None:
        return ""
    theirs = comparison.twin.held_out
    text = f"Its twin {'has' if comparison.twin.teachers else 'without teachers has'} {figure(theirs.last)}"
    if theirs.best_step != theirs.last_step:
        text += f", and had {figure(theirs.best)} at its best"
    reached, name = comparison.twins_last, "last"
    if comparison.twins_best is not None and (reached is None or theirs.best_step != theirs.last_step):
        reached, name = comparison.twins_best, "best"
    if not comparison.same_start:
        return f"{text}, but began at {figure(theirs.before)}: this is not the same student on the same text."
    if reached is None:
        return text + "."
    if reached.tokens is None:
        return f"{text}; the student has not reached the twin's {name}."
    ratio = "" if reached.ratio is None else f" (ratio {reached.ratio:.2f})"
    return (
        f"{text}. At or below the twin's {name} value the student was measured first after {reached.tokens:,} tokens, \
the twin after {reached.twin_tokens:,}{ratio}."
    )
