"""`tutelage report`: a run and its baseline as one self-contained HTML page, made from metrics.jsonl alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from trainer.errors import MetricsError, UserError
from trainer.manifest import replace_file
from trainer.paths import exists
from trainer.report.chart_specs import TEACHERS, chart_specs
from trainer.report.charts import (
    MAX_MARKERS,
    change_label,
    common_x_axis,
    draw_chart,
    other_charts,
)
from trainer.report.formatting import format_compact, format_number, format_section, format_setting
from trainer.report.history import History, read_history
from trainer.report.summary import Comparison, Summary, compare, sentence, summarise
from trainer.telemetry.jsonl import METRICS_FILE, flatten

DISTILLED, BASELINE = "distilled", "baseline"  # folders of the two runs of `tutelage demo`
SECTIONS = ("student", "data", "fusion", "loss", "rollout", "optim", "train", "eval")
COUNTS = (("samples", "for training"), ("held_out", "held out"), ("held_out_skipped", "held out, but skipped"))


@dataclass(frozen=True)
class Report:
    """The figures of a run, the result in one sentence, and the HTML page."""

    summary: Summary
    comparison: Comparison | None
    result: str
    page: str


def find_runs(folder: Path, baseline: Path | None) -> tuple[Path, Path | None]:
    """Return the folders of the run and of its baseline, None if there is no baseline.

    folder    the folder of a run, or a folder with distilled/ and baseline/, as `tutelage demo` writes them
    baseline  a folder, or the name of a folder next to the run. Raises UserError if it holds no metrics file
    """
    if not (folder / METRICS_FILE).is_file() and (folder / DISTILLED / METRICS_FILE).is_file():
        folder = folder / DISTILLED
    if baseline is None:
        sibling = folder.parent / BASELINE
        return folder, sibling if folder.name == DISTILLED and (sibling / METRICS_FILE).is_file() else None
    for candidate in (baseline, folder.parent / baseline):
        if (candidate / METRICS_FILE).is_file():
            return folder, candidate
    raise UserError(f"--baseline {baseline}: found no {METRICS_FILE} in it, nor in {folder.parent / baseline}")


def make_report(folder: Path, baseline: Path | None = None) -> Report:
    """Read a run and its baseline and make their report. Raises MetricsError if the run has no step yet."""
    run_folder, baseline_folder = find_runs(folder, baseline)
    run = read_history(run_folder)
    if not len(run.steps):
        raise MetricsError(f"{run_folder / METRICS_FILE} holds no step yet: there is nothing to report")
    other = read_history(baseline_folder) if baseline_folder is not None else None
    summary = summarise(run)
    comparison = compare(run, other) if other is not None else None
    result = sentence(summary, comparison)
    return Report(summary, comparison, result, _page(run, other, summary, comparison, result))


def save_page(page: str, path: Path) -> None:
    """Write or atomically replace the page. Raises UserError if it cannot be written or is not a regular file."""
    if path.is_symlink() or (exists(path) and not path.is_file()):
        raise UserError(f"cannot write {path}: it is a link or not a regular file; remove it, or give another --out")
    try:
        replace_file(path, page)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def _page(run: History, baseline: History | None, summary: Summary, comparison: Comparison | None, result: str) -> str:
    axis, sections = common_x_axis(run, baseline), chart_specs(run)
    drawn = {name: [draw_chart(spec, run, baseline, axis) for spec in specs] for name, specs in sections.items()}
    columns = {series.column for specs in sections.values() for spec in specs for series in spec.series}
    others, constants = other_charts(run, columns | {"tokens", "loss"}, axis)
    return (
        _environment()
        .get_template("report.html")
        .render(
            title=_title(run.folder),
            summary=summary,
            comparison=comparison,
            result=result,
            period=_period(run),
            settings=_settings(run),
            teachers=_teachers(run, summary),
            axis=axis.unit,
            sections={name: [figure for figure in figures if figure is not None] for name, figures in drawn.items()},
            teacher_section=TEACHERS,
            other_figures=others,
            constants=constants,
            teacher_changes=run.teacher_changes[:MAX_MARKERS],
            run_file=[(key, format_setting(value)) for key, value in flatten(run.config)],
        )
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": format_number, "compact": format_compact, "change_label": change_label}
    return environment


def _title(folder: Path) -> str:
    """Return the name of the run: that of its folder, preceded by the parent's if the folder has a generic name."""
    path = folder.resolve()
    return f"{path.parent.name}/{path.name}" if path.name in (DISTILLED, "out") else path.name


def _period(run: History) -> str:
    """Return when the run started and ended, in UTC; empty if the metrics file holds no times."""
    if not np.isfinite(run.start_time + run.end_time):
        return ""
    start, end = (datetime.fromtimestamp(seconds, UTC) for seconds in (run.start_time, run.end_time))
    end_text = f"{end:%H:%M}" if end.date() == start.date() else f"{end:%Y-%m-%d %H:%M}"
    return f"{start:%Y-%m-%d %H:%M} to {end_text} UTC"


def _settings(run: History) -> list[tuple[str, str]]:
    """Return the sections of the run file, one line each, and the number of samples."""
    rows = []
    for section in SECTIONS:
        values = run.config.get(section)
        if isinstance(values, Mapping) and (section != "fusion" or run.teachers):
            rows.append((section, format_section(values)))
    if run.reason is not None:
        rows.append(("ended", run.reason))
    counts = [f"{run.start[key]:,} {name}" for key, name in COUNTS if isinstance(run.start.get(key), int)]
    return [*rows, ("samples", " · ".join(counts))] if counts else rows


def _teachers(run: History, summary: Summary) -> list[dict[str, Any]]:
    """Return a row for each teacher: its section of the run file, its identity, its measured means."""
    identities = run.start.get("teachers")
    rows = []
    for teacher in run.config.get("teachers", ()):
        name = str(teacher["name"])
        identity = identities.get(name, {}) if isinstance(identities, Mapping) else {}
        text = ", ".join(str(identity[key]) for key in ("model", "revision", "fingerprint") if identity.get(key))
        rows.append({"name": name, "config": teacher, "identity": text, "summary": summary.teachers[name]})
    return rows
