"""`tutelage report DIR`: write the HTML report of a run."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from trainer.cli.app import Json, app, one_sentence_errors, print_json


@app.command()
def report(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a run, or a folder with distilled/ and baseline/.", metavar="DIR")
    ],
    baseline: Annotated[
        Path | None, typer.Option(help="Run without teachers to compare with: a folder, or its name next to DIR.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="HTML file to write. Default: DIR/report.html.")] = None,
    as_json: Json = False,
) -> None:
    """Write an HTML page with the results and curves of a run, compared with its baseline."""
    with one_sentence_errors(as_json):
        from trainer.report.page import make_report, save_page

        run_report = make_report(folder, baseline)
        path = out or folder / "report.html"
        save_page(run_report.page, path)
        if as_json:
            comparison = asdict(run_report.comparison) if run_report.comparison else None
            print_json({"run": asdict(run_report.summary), "comparison": comparison, "page": str(path)})
        else:
            typer.echo(f"{run_report.result}\n{path}")
