"""A run as its metrics.jsonl tells it: each step once, figures as columns beside the steps, teachers lost and back.

A run that was killed repeats the steps after its last checkpoint: where it started again, what stood after that step
is left out, so a step's last telling is the one that counts.
"""

import math
from array import array
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.errors import MetricsError
from trainer.reports.metrics import iter_metrics, numbers

FILE = "metrics.jsonl"
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Table:
    """Figures of one kind of event. columns[name][i] belongs to steps[i], NaN where that event did not have it."""

    steps: NDArray[np.int64]
    columns: Mapping[str, Floats]

    def __len__(self) -> int:
        return len(self.steps)

    def get(self, name: str) -> Floats | None:
        """A column that has at least one figure, else None: what was not measured is not 0."""
        column = self.columns.get(name)
        return None if column is None or np.isnan(column).all() else column


@dataclass(frozen=True)
class Mark:
    """Something that happened to a teacher, after `step` steps; `kind` is the event's name."""

    step: int
    kind: str
    teacher: str
    detail: str


@dataclass(frozen=True, eq=False)
class History:
    """All of a run so far.

    start         the last start event, {} if there is none
    steps, evals  one row for each step and for each measurement on held-out text
    marks         teachers lost and back, in order
    began, ended  Unix seconds of the first and the last event
    num_starts    how often it was started
    finished      whether the last planned step was made, or the run ended itself, and its end was written
    reason        why it ended itself before that; None if it did not
    exported      the last export: after which step, and its bits per byte of held-out text; None if there is none
    changed       settings that were others from a step on: the step, the key, what it was and what it is
    """

    folder: Path
    start: Mapping[str, Any]
    steps: Table
    evals: Table
    marks: tuple[Mark, ...]
    began: float
    ended: float
    num_starts: int
    finished: bool
    reason: str | None = None
    exported: tuple[int, float | None] | None = None
    changed: tuple[tuple[int, str, Any, Any], ...] = ()

    @property
    def run(self) -> Mapping[str, Any]:
        """The run file as it was started last."""
        run = self.start.get("run")
        return run if isinstance(run, Mapping) else {}

    @property
    def teachers(self) -> tuple[str, ...]:
        return tuple(str(teacher["name"]) for teacher in self.run.get("teachers", ()))

    @cached_property
    def tokens(self) -> Floats | None:
        """Tokens seen after each row of `steps`, None unless every step from the first on is there with its tokens."""
        tokens = self.steps.get("tokens")
        whole = tokens is not None and np.array_equal(self.steps.steps, np.arange(1, len(self.steps) + 1))
        if tokens is None or not whole or np.isnan(tokens).any():
            return None
        seen: Floats = np.cumsum(tokens)
        return seen

    def tokens_at(self, steps_N: NDArray[np.int64]) -> Floats | None:
        """Tokens seen after each of these steps; 0 before the first."""
        if self.tokens is None:
            return None
        seen: Floats = np.concatenate([[0.0], self.tokens])[np.clip(steps_N, 0, len(self.tokens))]
        return seen


class _Rows:
    """A table while it grows."""

    def __init__(self) -> None:
        self.steps = array("q")
        self._columns: dict[str, array[float]] = {}

    def put(self, step: int, figures: Mapping[str, float]) -> None:
        self.cut(step - 1)
        for name, value in figures.items():
            column = self._columns.setdefault(name, array("d"))
            column.extend([math.nan] * (len(self.steps) - len(column)))
            column.append(value)
        self.steps.append(step)

    def cut(self, step: int) -> None:
        """Leave out what stands after `step`."""
        if self.steps and self.steps[-1] > step:
            rest = bisect_right(self.steps, step)
            del self.steps[rest:]
            for column in self._columns.values():
                del column[rest:]

    def table(self) -> Table:
        for column in self._columns.values():
            column.extend([math.nan] * (len(self.steps) - len(column)))
        return Table(np.array(self.steps, np.int64), {n: np.array(c, np.float64) for n, c in self._columns.items()})


def read_history(folder: Path) -> History:
    """Read the metrics file of a run's folder. Raises MetricsError if there is none, or if it cannot be read."""
    path = folder / FILE
    if not path.is_file():
        raise MetricsError(f"{folder} holds no {FILE}: give the folder of a run, output.dir of its run file")
    start: Mapping[str, Any] = {}
    rows = {"step": _Rows(), "eval": _Rows()}
    marks: list[Mark] = []
    times: list[float] = []
    now, num_starts, finished = 0, 0, False
    reason: str | None = None
    exported: tuple[int, float | None] | None = None
    changed: list[tuple[int, str, Any, Any]] = []
    for event in iter_metrics(path):
        kind, now = event["event"], int(event.get("step", now))
        times = [times[0] if times else event.get("time", math.nan), event.get("time", math.nan)]
        if kind == "start":
            start, num_starts = event, num_starts + 1
            for table in rows.values():
                table.cut(now)
            marks = [mark for mark in marks if mark.step <= now]
            changed = [change for change in changed if change[0] <= now]
            changed += [(now, key, *values) for key, values in event.get("changed", {}).items()]
        elif kind in rows:
            rows[kind].put(now, numbers(event))
        elif kind.startswith("teacher_"):
            marks.append(Mark(now, kind, str(event.get("teacher")), str(event.get("detail"))))
        elif kind == "export":
            exported = now, event.get("held_out_bpb")
        reason = event.get("reason") if kind == "end" else None
        finished = kind == "end" and (reason is not None or now == start.get("steps", now))
    began, ended = times or (math.nan, math.nan)
    tables = (rows["step"].table(), rows["eval"].table())
    return History(
        folder, start, *tables, tuple(marks), began, ended, num_starts, finished, reason, exported, tuple(changed)
    )
