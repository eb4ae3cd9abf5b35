"""What people see: progress while a run goes on, tables when it has ended. Nothing else prints."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from trainer.commands.preview import Preview
from trainer.reports.metrics import Event, Listener

console = Console(stderr=True)  # progress and tables; standard output is for --json
REFRESH_S = 2.0


def watching(title: str) -> Listener:
    """A listener that shows a run's events as lines."""
    return _Watcher(title).show


class _Watcher:
    def __init__(self, title: str) -> None:
        self._title = title
        self._steps = 0
        self._shown_at = 0.0
        self._waited_s = 0.0
        self._waited_on: dict[str, float] = {}

    def show(self, event: Event) -> None:
        match event["event"]:
            case "start":
                self._steps = event["steps"]
                console.rule(self._title)
                console.print(f"{event['samples']} samples, steps {event['step']} to {event['steps']}")
                for line in _remarks(event):
                    console.print(line, soft_wrap=True, markup=False)
            case "step":
                self._waited_s += event["waited_s"]
                for name, teacher in event.get("teachers", {}).items():
                    self._waited_on[name] = self._waited_on.get(name, 0.0) + teacher["waited_s"]
                if time.monotonic() - self._shown_at > REFRESH_S or event["step"] == self._steps:
                    self._shown_at = time.monotonic()
                    console.print(self._line(event), highlight=False, soft_wrap=True)
            case "eval":
                console.print(f"[bold]held out after step {event['step']}: {event['held_out_bpb']:.4f} bits per byte")
            case "end" if event["model"]:
                console.print(f"student exported to {event['model']}")
            case "end":
                console.print(f"saved after step {event['step']}: --resume goes on from there")

    def _line(self, event: Event) -> str:
        shares = "  ".join(f"{name} {t['share']:.0%}" for name, t in event.get("teachers", {}).items())
        return (
            f"step {event['step']:>4}/{self._steps}  loss {event['loss']:.4f}  {event['tokens_per_s']:5.0f} tokens/s  "
            f"waited {self._waited_s:.1f} s in all{self._most_on()}  {shares}"
        )

    def _most_on(self) -> str:
        name, seconds = max(self._waited_on.items(), key=lambda each: each[1], default=("", 0.0))
        return f", {seconds:.1f} of them on {name}" if seconds > 0 else ""


def _remarks(start: Event) -> Iterator[str]:
    """What a start should not pass over."""
    for source in start.get("sources", ()):
        if source["broken"]:
            yield f"{source['name']}: {source['broken']} broken, left out ({'; '.join(source['first_broken'])})"
    for key, (was, now) in start.get("changed", {}).items():
        yield f"changed since it was started before: {key} {was} → {now}"


def show_preview(preview: Preview) -> None:
    """Teachers and fusions in bits per byte, one table."""
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
            "min_ce and avg_ce choose with the text in sight: by token above all, their figure flatters them."
        )
    console.print(table)


def show_evaluation(held_out: Mapping[str, Any], tasks: Mapping[str, Mapping[str, float]]) -> None:
    """What `tutelage eval` has measured, one table for each kind."""
    if held_out:
        rows = [["all of it", held_out["held_out_bpb"]], *map(list, held_out.get("held_out_domains", {}).items())]
        show_table("Held-out text", ["", "bits per byte"], rows)
    if tasks:
        rows = [[task, metric, value] for task, found in tasks.items() for metric, value in found.items()]
        show_table("Tasks", ["", "metric", "value"], rows)


def show_table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """Any table; the first column is text, the others are numbers."""
    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*(f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row))
    console.print(table)
