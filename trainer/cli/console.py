"""Terminal output: progress lines during a run and tables of results, on standard error."""

import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from trainer.evaluation.preview import Preview
from trainer.plain_text import one_line
from trainer.telemetry.jsonl import EventRecord, Listener

# Standard output is reserved for --json. Names and paths may look like the markup of rich: it is switched off.
console = Console(stderr=True, markup=False, emoji=False)
REFRESH_S = 2.0
RECENT_STEPS = 50  # number of steps from which the time left is estimated
COUNTS = {  # fields of the step event that are reported at the end of a run
    "shortened": "samples shortened",
    "folded_system": "system messages merged into the first user message",
    "omitted_reasoning": "messages whose reasoning the student's chat template omits",
    "changed_content": "texts that the student's chat template drops or rewrites",
}


def progress_listener(title: str) -> Listener:
    """Return a listener that prints the events of a run as lines."""
    return _Progress(title).show


class _Progress:
    def __init__(self, title: str) -> None:
        self._title = title
        self._num_steps = 0
        self._printed_at = 0.0
        self._recent_s: deque[float] = deque(maxlen=RECENT_STEPS)
        self._wait_s = 0.0
        self._num_skipped = self._num_without_update = 0
        self._teacher_wait_s: dict[str, float] = {}
        self._counts: Counter[str] = Counter()

    def show(self, record: EventRecord) -> None:
        match record["event"]:
            case "start":
                self._num_steps = record["steps"]
                console.rule(self._title)
                console.print(f"{record['samples']} samples, steps {record['step']} to {record['steps']}")
                for line in _start_remarks(record):
                    console.print(one_line(line), soft_wrap=True)
            case "step":
                self._add_step(record)
                if time.monotonic() - self._printed_at > REFRESH_S or record["step"] == self._num_steps:
                    self._printed_at = time.monotonic()
                    console.print(self._step_line(record), highlight=False, soft_wrap=True)
            case "eval":
                bpb = _number(record["held_out_bpb"])
                console.print(f"held-out text after step {record['step']}: {bpb} bits per byte", style="bold")
            case "rollout_eval":
                teachers = ", ".join(f"{name} {_number(bpb)}" for name, bpb in record["teachers"].items())
                console.print(f"rollouts after step {record['step']}: {teachers} bits per byte", style="bold")
            case "end":
                if self._num_skipped:
                    console.print(f"{self._skipped()} since this start")
                for name, meaning in COUNTS.items():
                    if self._counts[name]:
                        console.print(f"{self._counts[name]} {meaning} since this start", soft_wrap=True)
                if record["model"]:
                    console.print(one_line(f"student exported to {record['model']}"))
                else:
                    console.print(f"checkpoint saved after step {record['step']}: continue with --resume")

    def _add_step(self, record: EventRecord) -> None:
        self._num_skipped += record["skipped"]
        self._num_without_update += not record["tokens"]
        self._counts.update({name: record.get(name, 0) for name in COUNTS})
        sample_s = record.get("rollouts", {}).get("sample_s", 0.0)
        self._recent_s.append(record["step_s"] + record["wait_s"] + sample_s)
        self._wait_s += record["wait_s"]
        for name, teacher in record.get("teachers", {}).items():
            self._teacher_wait_s[name] = self._teacher_wait_s.get(name, 0.0) + teacher["wait_s"]

    def _step_line(self, record: EventRecord) -> str:
        parts = [
            f"step {record['step']:>4}/{self._num_steps}",
            f"loss {_number(record['loss'])}",
            f"{record['tokens_per_s']:5.0f} tokens/s",
            f"waited {self._wait_s:.1f} s{self._slowest_teacher()}",
            *(f"{name} {_percent(teacher['weight'])}" for name, teacher in record.get("teachers", {}).items()),
        ]
        if rollouts := record.get("rollouts"):
            parts.append(f"rollouts {rollouts['length']:.0f} tokens, {_number(rollouts['fused_bpb'])} bits per byte")
        if self._num_skipped:
            parts.append(self._skipped())
        num_left = self._num_steps - record["step"]
        if num_left > 0:
            parts.append(f"{duration(num_left * median(self._recent_s))} left")
        return "  ".join(parts)

    def _skipped(self) -> str:
        without = f" ({self._num_without_update} steps without an update)" if self._num_without_update else ""
        return f"{self._num_skipped} chats skipped{without}"

    def _slowest_teacher(self) -> str:
        name, seconds = max(self._teacher_wait_s.items(), key=lambda item: item[1], default=("", 0.0))
        return f" ({seconds:.1f} s for {name})" if seconds > 0 else ""


def duration(seconds: float) -> str:
    """Format a duration in its largest unit, for example "40 s", "3 min", "2.5 h" or "4.0 days"."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    if seconds < 59.5 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86_400:.1f} days"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _start_remarks(start: EventRecord) -> Iterator[str]:
    """Yield a line for the format of each source, its invalid records, the supervision, and each changed setting."""
    for source in start.get("sources", ()):
        yield f"{source['name']}: {source['format']}"
        if source["empty"]:
            yield f"{source['name']}: {source['empty']} empty records are left out"
        if source["invalid"]:
            examples = "; ".join(source["first_invalid"])
            yield f"{source['name']}: {source['invalid']} invalid records are skipped ({examples})"
        yield from (f"warning: {each}" for each in source.get("repeated", ()))
    if start.get("supervision"):
        yield f"supervision: {start['supervision']}"
    yield from start.get("remarks", ())
    for key, (old, new) in start.get("changed", {}).items():
        warning = "warning: " if key in start.get("changed_results", ()) else ""
        before, now = ("not set" if value is None else value for value in (old, new))
        yield f"{warning}changed since the previous start: {key} {before} → {now}"


def show_preview(preview: Preview) -> None:
    """Print the bits per byte of the student, the teachers and the fusion methods as one table."""
    table = Table(title=f"Bits per byte on {preview.num_bytes:,} held-out bytes")
    for column in ("", "own", "aligned", "listed mass"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("student", f"{preview.student_bpb:.4f}", "", "")
    for teacher in preview.teachers:
        table.add_row(
            f"teacher {teacher.name}",
            "" if teacher.own_bpb is None else f"{teacher.own_bpb:.4f}",
            f"{teacher.aligned_bpb:.4f}",
            f"{teacher.mean_mass:.3f}",
        )
    for method, bpb in preview.fused_bpb.items():
        table.add_row(f"fused by {method}", "", f"{bpb:.4f}", "")
    if preview.fused_bpb:
        table.caption = (
            "min_ce and avg_ce compute the teacher weights from the measured text: their values are too low, "
            "most of all with scope token."
        )
    console.print(table)


def show_evaluation(held_out: Mapping[str, Any], tasks: Mapping[str, Mapping[str, float]]) -> None:
    """Print the results of `tutelage eval`: a table for held-out text and a table for lm-eval tasks."""
    if held_out:
        domains = map(list, held_out.get("held_out_domains", {}).items())
        show_table("Held-out text", ["", "bits per byte"], [["all domains", held_out["held_out_bpb"]], *domains])
    if tasks:
        rows = [[task, metric, value] for task, metrics in tasks.items() for metric, value in metrics.items()]
        show_table("Tasks", ["", "metric", "value"], rows)


def show_table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """Print a table whose first column is text and whose other columns are numbers."""
    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*(f"{cell:.4f}" if isinstance(cell, float) else one_line(str(cell)) for cell in row))
    console.print(table)
