"""Read a metrics file as tables: one row for each step and for each evaluation, one column for each number.

A run that was killed repeats the steps after its last checkpoint. A start event therefore removes the rows after its
step, so that every step has one row: the last one that was written.
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
from trainer.telemetry.jsonl import METRICS_FILE, EventRecord, iter_metrics, numbers

Floats = NDArray[np.float64]
Export = tuple[int, float | None]  # step, bits per byte of held-out text


@dataclass(frozen=True, eq=False)
class Table:
    """Numbers of one kind of event. columns[name][i] belongs to steps[i]; NaN where the event has no such number."""

    steps: NDArray[np.int64]
    columns: Mapping[str, Floats]

    def __len__(self) -> int:
        return len(self.steps)

    def get(self, name: str) -> Floats | None:
        """Return a column that has at least one number, else None."""
        column = self.columns.get(name)
        return None if column is None or np.isnan(column).all() else column


@dataclass(frozen=True)
class TeacherChange:
    """A teacher was lost or joined again after `step` steps. `kind` is the name of the event."""

    step: int
    kind: str
    teacher: str
    detail: str


@dataclass(frozen=True, eq=False)
class History:
    """A run as far as its metrics file goes.

    start            the last start event; {} if there is none
    steps, evals     one row for each step and for each evaluation on held-out text
    teacher_changes  teachers that were lost or joined again, in order
    start_time, end_time  Unix seconds of the first and of the last event; NaN without events
    num_starts       how often the run was started or resumed
    finished         whether the run ended with its last planned step or by early stopping
    reason           why the run ended before its last planned step; None if it did not
    exported         the last export; None if there is none
    changed          changed settings: step, key, old value, new value
    """

    folder: Path
    start: Mapping[str, Any]
    steps: Table
    evals: Table
    teacher_changes: tuple[TeacherChange, ...]
    start_time: float
    end_time: float
    num_starts: int
    finished: bool
    reason: str | None = None
    exported: Export | None = None
    changed: tuple[tuple[int, str, Any, Any], ...] = ()

    @property
    def config(self) -> Mapping[str, Any]:
        """The run file of the last start."""
        config = self.start.get("run")
        return config if isinstance(config, Mapping) else {}

    @property
    def teachers(self) -> tuple[str, ...]:
        """Names of the teachers."""
        return tuple(str(teacher["name"]) for teacher in self.config.get("teachers", ()))

    @cached_property
    def tokens(self) -> Floats | None:
        """Tokens seen after each row of `steps`; None unless every step from the first on has a token count."""
        tokens = self.steps.get("tokens")
        complete = np.array_equal(self.steps.steps, np.arange(1, len(self.steps) + 1))
        if tokens is None or not complete or np.isnan(tokens).any():
            return None
        seen: Floats = np.cumsum(tokens)
        return seen

    def tokens_at(self, steps_N: NDArray[np.int64]) -> Floats | None:
        """Return the tokens seen after each of these steps, 0 before the first one. None where `tokens` is None."""
        if self.tokens is None:
            return None
        seen: Floats = np.concatenate([[0.0], self.tokens])[np.clip(steps_N, 0, len(self.tokens))]
        return seen


class _TableBuilder:
    """Rows in the order of their steps. A row replaces all rows from its step on."""

    def __init__(self) -> None:
        self._steps = array("q")
        self._columns: dict[str, array[float]] = {}

    def append(self, step: int, values: Mapping[str, float]) -> None:
        self.truncate(step - 1)
        for name, value in values.items():
            column = self._columns.setdefault(name, array("d"))
            column.extend([math.nan] * (len(self._steps) - len(column)))
            column.append(value)
        self._steps.append(step)

    def truncate(self, step: int) -> None:
        """Remove the rows after `step`."""
        if self._steps and self._steps[-1] > step:
            num_kept = bisect_right(self._steps, step)
            del self._steps[num_kept:]
            for column in self._columns.values():
                del column[num_kept:]

    def build(self) -> Table:
        for column in self._columns.values():
            column.extend([math.nan] * (len(self._steps) - len(column)))
        columns = {name: np.array(column, np.float64) for name, column in self._columns.items()}
        return Table(np.array(self._steps, np.int64), columns)


class _HistoryBuilder:
    """Reads the events of a metrics file in order."""

    def __init__(self) -> None:
        self.step = 0
        self.start: Mapping[str, Any] = {}
        self.tables = {"step": _TableBuilder(), "eval": _TableBuilder()}
        self.teacher_changes: list[TeacherChange] = []
        self.start_time = self.end_time = math.nan
        self.num_starts = 0
        self.finished = False
        self.reason: str | None = None
        self.exported: Export | None = None
        self.changed: list[tuple[int, str, Any, Any]] = []

    def add(self, record: EventRecord) -> None:
        kind, self.step = record["event"], int(record.get("step", self.step))
        self.end_time = record.get("time", math.nan)
        if math.isnan(self.start_time):
            self.start_time = self.end_time
        if kind == "start":
            self._restart(record)
        elif kind in self.tables:
            self.tables[kind].append(self.step, numbers(record))
        elif kind.startswith("teacher_"):
            change = TeacherChange(self.step, kind, str(record.get("teacher")), str(record.get("detail")))
            self.teacher_changes.append(change)
        elif kind == "export":
            self.exported = self.step, record.get("held_out_bpb")
        self.reason = record.get("reason") if kind == "end" else None
        planned = self.start.get("steps", self.step)
        self.finished = kind == "end" and (self.reason is not None or self.step == planned)

    def _restart(self, record: EventRecord) -> None:
        """Remove what was recorded after the step from which the run is resumed."""
        self.start, self.num_starts = record, self.num_starts + 1
        for table in self.tables.values():
            table.truncate(self.step)
        self.teacher_changes = [change for change in self.teacher_changes if change.step <= self.step]
        self.changed = [change for change in self.changed if change[0] <= self.step]
        self.changed += [(self.step, key, old, new) for key, (old, new) in record.get("changed", {}).items()]


def read_history(folder: Path) -> History:
    """Read the metrics file in the folder of a run. Raises MetricsError if there is none or it cannot be read."""
    path = folder / METRICS_FILE
    if not path.is_file():
        raise MetricsError(f"{folder} holds no {METRICS_FILE}: give the folder of a run, output.dir of its run file")
    builder = _HistoryBuilder()
    for record in iter_metrics(path):
        builder.add(record)
    return History(
        folder=folder,
        start=builder.start,
        steps=builder.tables["step"].build(),
        evals=builder.tables["eval"].build(),
        teacher_changes=tuple(builder.teacher_changes),
        start_time=builder.start_time,
        end_time=builder.end_time,
        num_starts=builder.num_starts,
        finished=builder.finished,
        reason=builder.reason,
        exported=builder.exported,
        changed=tuple(builder.changed),
    )
