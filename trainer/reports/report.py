"""`tutelage report`: a run and its twin as one page that needs nothing else, from metrics.jsonl as it is."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from trainer.errors import MetricsError, UserError
from trainer.reports.curves import figure, short
from trainer.reports.figures import MOST_MARKS, axis_of, draw_plan, further, plans, said
from trainer.reports.history import FILE, History, read_history
from trainer.reports.metrics import flat
from trainer.reports.summary import Comparison, Summary, compare, sentence, summarise

PLUMBING = ("chunk_tokens", "prefetch_tokens", "prefetch_bytes", "target_cache_bytes", "text_column", "device")
COUNTS = (("samples", "to train on"), ("held_out", "held out"), ("held_out_skipped", "held out, but skipped"))


@dataclass(frozen=True)
class Report:
    """Figures for machines, the sentence and the page for people."""

    summary: Summary
    comparison: Comparison | None
    result: str
    page: str


def find_runs(folder: Path, twin: Path | None) -> tuple[Path, Path | None]:
    """The run's folder and its twin's: as given, a sibling by its name, or fused/ and twin/ as the demo writes them."""
    if not (folder / FILE).is_file() and (folder / "fused" / FILE).is_file():
        folder = folder / "fused"
    if twin is None:
        beside = folder.parent / "twin"
        return folder, beside if folder.name == "fused" and (beside / FILE).is_file() else None
    for candidate in (twin, folder.parent / twin):
        if (candidate / FILE).is_file():
            return folder, candidate
    raise UserError(f"--twin {twin}: there is no {FILE} in it, nor in {folder.parent / twin}")


def make_report(folder: Path, twin: Path | None = None) -> Report:
    """Read a run and its twin, and write what came of them. Raises MetricsError if there is nothing to tell."""
    run_folder, twin_folder = find_runs(folder, twin)
    run = read_history(run_folder)
    if not len(run.steps):
        raise MetricsError(f"{run_folder / FILE} holds no step yet: there is nothing to report")
    other = read_history(twin_folder) if twin_folder is not None else None
    summary = summarise(run)
    comparison = compare(run, other) if other is not None else None
    result = sentence(summary, comparison)
    return Report(summary, comparison, result, _page(run, other, summary, comparison, result))


def save_page(page: str, path: Path) -> None:
    """Raises UserError if it cannot be written."""
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


# --- the page ---


def _page(run: History, twin: History | None, summary: Summary, comparison: Comparison | None, result: str) -> str:
    axis, chapters = axis_of(run, twin), plans(run)
    drawn = {name: [draw_plan(plan, run, twin, axis) for plan in chapter] for name, chapter in chapters.items()}
    known = {line.column for chapter in chapters.values() for plan in chapter for line in plan.lines}
    small, constant = further(run, known | {"tokens", "loss"}, axis)
    room = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    room.filters |= {"figure": figure, "short": short, "said": said}
    return room.get_template("report.html").render(
        title=_title(run.folder),
        run=run,
        twin=twin,
        summary=summary,
        comparison=comparison,
        result=result,
        times=_times(run),
        rows=_rows(run),
        teachers=_teachers(run, summary),
        axis=axis.unit,
        chapters={name: [one for one in figures if one is not None] for name, figures in drawn.items()},
        further=small,
        constant=constant,
        marks=run.marks[:MOST_MARKS],
        run_file=[(key, "–" if value in (None, []) else _value(value)) for key, value in flat(run.run)],
    )


def _title(folder: Path) -> str:
    whole = folder.resolve()
    return f"{whole.parent.name}/{whole.name}" if whole.name in ("fused", "out") else whole.name


def _times(run: History) -> str:
    if not np.isfinite(run.began + run.ended):
        return ""
    began, ended = (datetime.fromtimestamp(t, UTC) for t in (run.began, run.ended))
    last = f"{ended:%H:%M}" if ended.date() == began.date() else f"{ended:%Y-%m-%d %H:%M}"
    return f"{began:%Y-%m-%d %H:%M} to {last} UTC"


def _rows(run: History) -> list[tuple[str, str]]:
    """What was run, a section of the run file in a line; what only says how fast it goes is left to the whole file."""
    rows = []
    for section in ("student", "data", "fusion", "loss", "optim", "train", "eval"):
        values = run.run.get(section)
        if not isinstance(values, Mapping) or (section == "fusion" and not run.teachers):
            continue
        rows.append((section, settings(values)))
    if run.reason is not None:
        rows.append(("ended", run.reason))
    counts = [f"{run.start[key]:,} {name}" for key, name in COUNTS if isinstance(run.start.get(key), int)]
    return [*rows, ("samples", " · ".join(counts))] if counts else rows


def settings(values: Mapping[str, Any], leave_out: Collection[str] = PLUMBING) -> str:
    """A section of a run file in a line, without what it leaves open."""
    return " · ".join(_said(values, leave_out))


def _said(values: Mapping[str, Any], leave_out: Collection[str]) -> list[str]:
    shown = {key: value for key, value in values.items() if key not in leave_out and value not in (None, {}, [], "")}
    return [f"{key} {_value(value)}" for key, value in shown.items()]


def _value(value: Any) -> str:
    """As a person would write it in a run file, without brackets."""
    if isinstance(value, list | tuple):
        return ("; " if any(isinstance(each, Mapping) for each in value) else ", ").join(map(_value, value))
    if isinstance(value, Mapping):
        return " ".join(_said(value, PLUMBING))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _teachers(run: History, summary: Summary) -> list[dict[str, Any]]:
    """A row for each teacher: what the run file says, what its card said if the metrics have it, what was measured."""
    cards = run.start.get("teachers")
    rows = []
    for teacher in run.run.get("teachers", ()):
        name = str(teacher["name"])
        card = cards.get(name, {}) if isinstance(cards, Mapping) else {}
        which = ", ".join(str(card[key]) for key in ("model", "revision", "fingerprint") if card.get(key))
        rows.append({"name": name, "config": teacher, "card": which, "figures": summary.teachers[name]})
    return rows
